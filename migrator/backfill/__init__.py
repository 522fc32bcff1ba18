"""Re-embedding of the stored images, in bounded runs of durable chunks."""
