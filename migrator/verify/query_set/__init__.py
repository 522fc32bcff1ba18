"""The queries of a verification: drawn once, then pinned."""
