"""FAISS: a folder with an index and its items, or the files that an application has beside each other."""

from migrator.adapters.faiss.store import open_store

__all__ = ["open_store"]
