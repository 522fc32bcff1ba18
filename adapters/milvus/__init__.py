"""Milvus: a server, or Milvus Lite, a local file."""

from migrator.adapters.milvus.store import open_store

__all__ = ["open_store"]
