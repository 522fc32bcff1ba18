"""Losses, one a file. What combines them is a method (`migrator.trainer.methods`)."""
