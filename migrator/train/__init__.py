"""`migrator train`."""
