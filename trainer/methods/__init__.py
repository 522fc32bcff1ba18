"""Training methods: each adds losses up (`migrator.trainer.methods.registry`)."""
