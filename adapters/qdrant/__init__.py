"""Qdrant: a server over REST or gRPC, a local folder of the client, or a folder of Qdrant Edge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migrator.adapters.base import Store, StoreRejected

KEYS = ("kind", "url", "api_key", "grpc", "grpc_port", "path", "engine", "collection", "vector", "timeout")


def open_store(config: Mapping[str, Any], *, write: bool) -> Store:
    """Opens `config["collection"]`, a name or an alias, at `url` or in the folder `path`.

    Raises `StoreRejected` for what is not there or cannot be migrated, `StoreUnavailable` if the server does not
    answer, `StoreBusy` if another process has the folder.
    """
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        raise StoreRejected(f"a qdrant store has no setting {unknown[0]!r}: known are {', '.join(KEYS[1:])}")
    if ("url" in config) == ("path" in config):
        raise StoreRejected("a qdrant store needs either `url`, of a server, or `path`, a local folder")
    if not isinstance(config.get("collection"), str):
        raise StoreRejected("a qdrant store needs `collection`, a collection's name or alias")
    if "engine" in config and config["engine"] != "local":
        from migrator.adapters.qdrant.edge import open_edge_store

        return open_edge_store(config, write=write)
    from migrator.adapters.qdrant.connection import connect
    from migrator.adapters.qdrant.store import QdrantStore

    connection = connect(config)
    try:
        return QdrantStore(connection, config["collection"], vector=config.get("vector"), write=write)
    except BaseException:
        connection.release()
        raise
