"""Upgrade the embedding model behind an image-search vector database without downtime."""

__version__ = "0.1.0"
