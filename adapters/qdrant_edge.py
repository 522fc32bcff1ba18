"""Qdrant Edge: Qdrant's engine in this process, over a folder that one process at a time may open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.base import Store, StoreRejected


def open_store(config: Mapping[str, Any], *, write: bool) -> Store:
    """Opens `config["collection"]`, a name or an alias, in the folder `path`."""
    raise StoreRejected(f"{config['path']} cannot be opened with engine {config['engine']!r} yet")
