"""The world's gallery in each kind of store, as the application that owns it writes and reads it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from migrator.adapters.base import Store, StoreBusy
from migrator.adapters.registry import open_store
from tests.world import DIM, World, embed_images


@dataclass(frozen=True)
class Item:
    """What lies in a store: vector and payload."""

    vector: np.ndarray
    payload: Mapping[str, Any]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Item)
            and np.array_equal(self.vector, other.vector)
            and dict(self.payload) == dict(other.payload)
        )

    def near(self, vector: np.ndarray) -> bool:
        """The same vector, up to a store's own normalisation."""
        return bool(np.allclose(self.vector, vector, rtol=0, atol=1e-6))


Search = Callable[[str, np.ndarray], tuple[Any, float]]
"""Collection and query vector -> the nearest item, and its cosine."""


class Kind(ABC):
    """One kind of store, holding the world's collection."""

    name: str
    exclusive = False
    """One process at a time may open it, for reading too."""

    def __init__(self, world: World) -> None:
        self.world = world

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The `store` section of migrations.yaml."""

    @abstractmethod
    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Makes the collection if need be, and upserts items into it, as the application does."""

    @abstractmethod
    def delete(self, ids: Sequence[Any]) -> None: ...

    @abstractmethod
    def set_payload(self, item: Any, payload: Mapping[str, Any]) -> None:
        """The application changes what stands beside a vector, and leaves that alone."""

    def is_busy(self, error: Exception) -> bool:
        """Whether that is what an exclusive kind says while another process has it open."""
        return False

    @abstractmethod
    def adapter(self) -> type[Any]:
        """The class of this kind's stores."""

    @abstractmethod
    def refusing(self, bad: Any, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
        """While it lasts the store's own client refuses a request that would write the item `bad`."""

    @contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        """While it lasts the server is there, for kinds that have one. `folder` is for what it leaves."""
        yield

    def alias(self) -> str:
        """What the application calls the collection where it does not ask the route."""
        return "toys"

    def searching(self) -> AbstractContextManager[Search]:
        """The application's own search. Kinds that one process at a time may open have none."""
        raise NotImplementedError

    def use(self) -> None:
        """Moves the world's items into this store and points the configuration at it."""
        import faiss
        import pyarrow.parquet as pq

        index = faiss.read_index(str(self.world.gallery / "index.faiss"))
        rows = pq.read_table(self.world.gallery / "items.parquet").to_pylist()
        ids = [row.pop("id") for row in rows]
        vectors = index.reconstruct_n(0, index.ntotal)
        self._configure()
        self.put(ids, vectors, rows)

    def _configure(self) -> None:
        document = yaml.safe_load(self.world.config.read_text())
        (migration,) = document["migrations"].values()
        migration["store"] = self.settings()
        self.world.config.write_text(yaml.safe_dump(document))

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The collection through the adapter, read only; its own name, or where its alias leads."""
        from migrator.config import load_config

        config = load_config(self.world.config)
        (migration,) = config.migrations.values()
        with closing(open_store(migration.store.settings(), write=False)) as store:
            yield store

    def items(self, collection_id: str | None = None) -> dict[Any, Item]:
        """Everything in the collection, or in another one beside it."""
        with self.opened() as first:
            if collection_id is None:
                return _items(first)
            with closing(first.open_collection(collection_id)) as store:
                return _items(store)

    def exists(self, collection_id: str) -> bool:
        with self.opened() as store:
            return store.exists(collection_id)

    def upsert_images(self, ids: Sequence[Any], names: Sequence[str], which: str = "old") -> None:
        """The application embeds images with one of the encoders and writes the items."""
        payloads = [{"path": name, "kind": "kind 0"} for name in names]
        self.put(ids, embed_images(self.world, which, names), payloads)


def _items(store: Store) -> dict[Any, Item]:
    found: dict[Any, Item] = {}
    ids = store.scan_ids(after=None, limit=10**6)
    page = store.read(ids)
    for item, vector, payload in zip(page.ids, page.vectors, page.payloads, strict=True):
        assert item not in found
        found[item] = Item(vector, json.loads(json.dumps(dict(payload))))
    assert len(found) == store.count()
    return found


class QdrantFolder(Kind):
    """A local Qdrant with the collection `toys_v1`, which the configuration addresses by the alias `toys`."""

    name = "qdrant"
    exclusive = True

    @property
    def folder(self) -> Path:
        return self.world.folder / "qdrant"

    def settings(self) -> dict[str, Any]:
        return {"kind": "qdrant", "path": "./qdrant", "collection": "toys"}

    def connected(self) -> Any:
        from qdrant_client import QdrantClient

        return QdrantClient(path=str(self.folder))

    @contextmanager
    def client(self) -> Iterator[Any]:
        from qdrant_client import models

        with closing(self.connected()) as client:
            if not client.get_collections().collections:
                params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
                client.create_collection("toys_v1", params)
                client.update_collection_aliases(
                    [
                        models.CreateAliasOperation(
                            create_alias=models.CreateAlias(collection_name="toys_v1", alias_name="toys")
                        )
                    ]
                )
            yield client

    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        from qdrant_client import models

        points = [
            models.PointStruct(id=item, vector=vector.tolist(), payload=dict(payload))
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        with self.client() as client:
            client.upsert("toys", points)

    def delete(self, ids: Sequence[Any]) -> None:
        with self.client() as client:
            client.delete("toys", list(ids))

    def set_payload(self, item: Any, payload: Mapping[str, Any]) -> None:
        with self.client() as client:
            client.set_payload("toys", dict(payload), points=[item])

    def is_busy(self, error: Exception) -> bool:
        return self.exclusive and isinstance(error, (RuntimeError, StoreBusy))

    def adapter(self) -> type[Any]:
        from migrator.adapters.qdrant.store import QdrantStore

        return QdrantStore

    @contextmanager
    def refusing(self, bad: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from qdrant_client import QdrantClient

        upsert = QdrantClient.upsert

        def refuse(client: Any, name: str, points: Sequence[Any], **options: Any) -> Any:
            if any(point.id == bad for point in points):
                raise ValueError("this payload is too strange")
            return upsert(client, name, points, **options)

        with monkeypatch.context() as patch:
            patch.setattr(QdrantClient, "upsert", refuse)
            yield


class QdrantOverRest(QdrantFolder):
    """The same collection on a server; `url` is that of a `tests.qdrant_front`, or of a real one."""

    name = "qdrant-rest"
    exclusive = False

    def __init__(self, world: World, url: str = "", *, api_key: str | None = None) -> None:
        super().__init__(world)
        self.url, self.api_key = url, api_key

    @contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        """A server in a process of its own, which outlives the commands that are killed."""
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.qdrant_front"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            self.url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            yield
        finally:
            server.stdin.close()
            server.wait(timeout=30)
            server.stdout.close()

    @contextmanager
    def searching(self) -> Iterator[Search]:
        from qdrant_client import models

        with closing(self.connected()) as client:

            def search(collection: str, vector: np.ndarray) -> tuple[Any, float]:
                request = models.QueryRequest(query=vector.tolist(), limit=1)
                (answer,) = client.query_batch_points(collection, requests=[request])
                (hit,) = answer.points
                return hit.id, float(hit.score)

            yield search

    def settings(self) -> dict[str, Any]:
        key = {} if self.api_key is None else {"api_key": self.api_key}
        return {"kind": "qdrant", "url": self.url, "collection": "toys", "timeout": 20, **key}

    def connected(self) -> Any:
        from qdrant_client import QdrantClient

        return QdrantClient(url=self.url, api_key=self.api_key, timeout=20, check_compatibility=False)


class QdrantEdge(Kind):
    """A folder with the shard `toys_v1`, which the configuration addresses by the symbolic link `toys`."""

    name = "qdrant-edge"
    exclusive = True

    @property
    def folder(self) -> Path:
        return self.world.folder / "edge"

    def settings(self) -> dict[str, Any]:
        return {"kind": "qdrant", "engine": "edge", "path": "./edge", "collection": "toys"}

    @contextmanager
    def shard(self) -> Iterator[Any]:
        from qdrant_edge import Distance, EdgeConfig, EdgeShard, EdgeVectorParams

        if not self.folder.exists():
            (self.folder / "toys_v1").mkdir(parents=True)
            config = EdgeConfig(vectors=EdgeVectorParams(DIM, Distance.Cosine))
            EdgeShard.create(str(self.folder / "toys_v1"), config).close()
            (self.folder / "toys").symlink_to("toys_v1")
        folder = (self.folder / "toys").resolve()
        lock = os.open(folder, os.O_RDONLY)
        try:
            # As docs/reference/stores/qdrant.md asks: a load that the engine refuses harms the one who is in.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with closing(EdgeShard.load(str(folder))) as shard:
                yield shard
        finally:
            os.close(lock)

    def _update(self, operation: Any) -> None:
        with self.shard() as shard:
            shard.update(operation)

    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        from qdrant_edge import Point, UpdateOperation

        points = [
            Point(item, vector, dict(payload)) for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        self._update(UpdateOperation.upsert_points(points))

    def delete(self, ids: Sequence[Any]) -> None:
        from qdrant_edge import UpdateOperation

        self._update(UpdateOperation.delete_points(list(ids)))

    def set_payload(self, item: Any, payload: Mapping[str, Any]) -> None:
        from qdrant_edge import UpdateOperation

        self._update(UpdateOperation.set_payload([item], dict(payload)))

    def is_busy(self, error: Exception) -> bool:
        return isinstance(error, (StoreBusy, BlockingIOError))

    def adapter(self) -> type[Any]:
        from migrator.adapters.qdrant.edge import EdgeStore

        return EdgeStore

    @contextmanager
    def refusing(self, bad: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        import qdrant_edge

        known = qdrant_edge.UpdateOperation

        class Refusing:
            def __getattr__(self, name: str) -> Any:
                return getattr(known, name)

            def upsert_points(self, points: list[Any], **options: Any) -> Any:
                if any(point.id == bad for point in points):
                    raise Exception("this payload is too strange")  # the engine has no better one
                return known.upsert_points(points, **options)

        with monkeypatch.context() as patch:
            patch.setattr(qdrant_edge, "UpdateOperation", Refusing())
            yield


class FaissFolder(Kind):
    """A folder `toys_v1`, which the configuration addresses by the symbolic link `toys`."""

    name = "faiss"

    @property
    def folder(self) -> Path:
        return self.world.folder / "toys_v1"

    def settings(self) -> dict[str, Any]:
        return {"kind": "faiss", "path": "./toys"}

    def use(self) -> None:
        self.world.gallery.rename(self.folder)
        (self.world.folder / "toys").symlink_to(self.folder.name)
        self._configure()

    def alias(self) -> str:
        return str(self.world.folder / "toys")

    @contextmanager
    def searching(self) -> Iterator[Search]:
        import faiss
        import pyarrow.parquet as pq

        def search(collection: str, vector: np.ndarray) -> tuple[Any, float]:
            folder = Path(collection).resolve()
            scores, rows = faiss.read_index(str(folder / "index.faiss")).search(vector[None], 1)
            ids = pq.read_table(folder / "items.parquet", columns=["id"]).column("id")
            return ids[int(rows[0, 0])].as_py(), float(scores[0, 0])

        yield search

    def content(self) -> dict[Any, tuple[np.ndarray, dict[str, Any]]]:
        import faiss
        import pyarrow.parquet as pq

        folder = (self.world.folder / "toys").resolve()
        index = faiss.read_index(str(folder / "index.faiss"))
        rows = pq.read_table(folder / "items.parquet").to_pylist()
        vectors = index.reconstruct_n(0, index.ntotal)
        return {row.pop("id"): (vector, row) for vector, row in zip(vectors, rows, strict=True)}

    def replace_content(self, content: Mapping[Any, tuple[np.ndarray, Mapping[str, Any]]]) -> None:
        import faiss
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = (self.world.folder / "toys").resolve()
        index = faiss.IndexFlatIP(DIM)
        index.add(np.array([vector for vector, _ in content.values()], np.float32))
        faiss.write_index(index, str(folder / "index.new"))
        table = pa.Table.from_pylist([{"id": item, **payload} for item, (_, payload) in content.items()])
        pq.write_table(table, folder / "items.new")
        (folder / "items.new").replace(folder / "items.parquet")
        (folder / "index.new").replace(folder / "index.faiss")

    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        content: dict[Any, Any] = self.content()
        content.update({item: (vector, payload) for item, vector, payload in zip(ids, vectors, payloads, strict=True)})
        self.replace_content(content)

    def delete(self, ids: Sequence[Any]) -> None:
        content = self.content()
        for item in ids:
            del content[item]
        self.replace_content(content)

    def set_payload(self, item: Any, payload: Mapping[str, Any]) -> None:
        content = self.content()
        content[item] = (content[item][0], dict(payload))
        self.replace_content(content)

    def adapter(self) -> type[Any]:
        from migrator.adapters.faiss.store import FaissStore

        return FaissStore

    @contextmanager
    def refusing(self, bad: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """There is no client in between: the check of vectors is what can refuse one item."""
        from migrator.adapters.faiss import store as faiss
        from migrator.adapters.vectors import unusable

        def refuse(ids: Sequence[Any], vectors: np.ndarray) -> dict[Any, str]:
            return {**unusable(ids, vectors), **{item: "this vector is too strange" for item in ids if item == bad}}

        with monkeypatch.context() as patch:
            patch.setattr(faiss, "unusable", refuse)
            yield


class MilvusLite(Kind):
    """A Milvus Lite file with the collection `toys_v1`, which the configuration addresses by the alias `toys`."""

    name = "milvus-lite"
    exclusive = True

    def __init__(self, world: World, *, dynamic: bool = True) -> None:
        super().__init__(world)
        self.dynamic = dynamic

    @property
    def uri(self) -> str:
        return str(self.world.folder / "milvus.db")

    def settings(self) -> dict[str, Any]:
        return {"kind": "milvus", "uri": "./milvus.db", "collection": "toys"}

    @contextmanager
    def client(self) -> Iterator[Any]:
        from milvus_lite import server_manager_instance
        from pymilvus import MilvusClient

        client = MilvusClient(self.uri)
        try:
            if not client.list_collections():
                make_milvus_collection(client, "toys_v1", dynamic=self.dynamic)
                client.create_alias("toys_v1", "toys")
            yield client
        finally:
            client.close()
            server_manager_instance.release_server(self.uri)

    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        rows = [
            {"id": item, "embedding": vector, **payload}
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        with self.client() as client:
            client.upsert("toys", rows)

    def delete(self, ids: Sequence[Any]) -> None:
        with self.client() as client:
            client.delete("toys", ids=list(ids))

    def set_payload(self, item: Any, payload: Mapping[str, Any]) -> None:
        with self.client() as client:
            client.load_collection("toys")
            client.upsert("toys", [{"id": item, **payload}], partial_update=True)

    def is_busy(self, error: Exception) -> bool:
        return isinstance(error, StoreBusy) or "Open local milvus failed" in str(error)

    @contextmanager
    def searching(self) -> Iterator[Search]:
        """In the process that also migrates, which is the only one that may open the file."""
        from migrator.adapters.milvus.connection import Connection

        kept = Connection({"uri": self.uri})  # the last one would end Milvus Lite under the client
        with self.client() as client:
            client.load_collection("toys")
            yield milvus_search(client)
        kept.release()

    def adapter(self) -> type[Any]:
        from migrator.adapters.milvus.store import MilvusStore

        return MilvusStore

    @contextmanager
    def refusing(self, bad: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from pymilvus import MilvusClient, MilvusException

        def refusing(write: Any) -> Any:
            def refuse(client: Any, name: str, data: Sequence[Any], **options: Any) -> Any:
                if any(row["id"] == bad for row in data):
                    raise MilvusException(1100, "this row is too strange")
                return write(client, name, data, **options)

            return refuse

        with monkeypatch.context() as patch:
            patch.setattr(MilvusClient, "upsert", refusing(MilvusClient.upsert))
            patch.setattr(MilvusClient, "insert", refusing(MilvusClient.insert))
            yield


class MilvusOnAServer(MilvusLite):
    """The same collection and alias on a Milvus server, which writes whole rows."""

    name = "milvus"
    exclusive = False

    def __init__(self, world: World, address: str = "", database: str = "default") -> None:
        super().__init__(world)
        self.address, self.database = address, database

    @property
    def uri(self) -> str:
        return self.address

    def settings(self) -> dict[str, Any]:
        database = {} if self.database == "default" else {"database": self.database}
        return {"kind": "milvus", "uri": self.uri, "collection": "toys", "timeout": 10, **database}

    @contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        from tests.milvus_server import milvus_server

        with milvus_server(folder / "milvus") as server:
            self.address = server.uri
            yield

    @contextmanager
    def client(self) -> Iterator[Any]:
        from pymilvus import MilvusClient

        with closing(MilvusClient(self.uri, timeout=30)) as client:
            if self.database not in client.list_databases():
                client.create_database(self.database)
        with closing(MilvusClient(self.uri, db_name=self.database, timeout=30)) as client:
            if not client.list_collections():
                make_milvus_collection(client, "toys_v1", dynamic=self.dynamic)
                client.create_alias("toys_v1", "toys")
            yield client

    def set_payload(self, item: Any, payload: Mapping[str, Any]) -> None:
        with self.client() as client:
            (row,) = client.query(
                "toys",
                filter=f"id in [{item}]",
                output_fields=["*"],
                consistency_level="Strong",
                strict_float32=True,
            )
            client.upsert("toys", [{**row, **payload}])

    @contextmanager
    def searching(self) -> Iterator[Search]:
        with self.client() as client:
            yield milvus_search(client)


def milvus_search(client: Any) -> Search:
    def search(collection: str, vector: np.ndarray) -> tuple[Any, float]:
        ((hit,),) = client.search(
            collection, data=[vector], anns_field="embedding", limit=1, consistency_level="Strong", timeout=30
        )
        return hit["id"], float(hit["distance"])

    return search


def make_milvus_collection(client: Any, name: str, *, dynamic: bool = True) -> None:
    """As an application makes one, with an HNSW index."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=dynamic)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("path", DataType.VARCHAR, max_length=200)
    schema.add_field("kind", DataType.VARCHAR, max_length=50)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="HNSW", metric_type="COSINE", params={"M": 8, "efConstruction": 64})
    client.create_collection(name, schema=schema, index_params=index)


def kind_of(world: World) -> Kind:
    """The kind that a world's configuration names."""
    document = yaml.safe_load(world.config.read_text())
    (migration,) = document["migrations"].values()
    store = migration["store"]
    if store.get("url"):
        return QdrantOverRest(world, store["url"])
    if store.get("engine") == "edge":
        return QdrantEdge(world)
    if "://" in store.get("uri", ""):
        return MilvusOnAServer(world, store["uri"], store.get("database", "default"))
    return {"faiss": FaissFolder, "milvus": MilvusLite, "qdrant": QdrantFolder}[store["kind"]](world)


KINDS: list[type[Kind]] = [FaissFolder, MilvusLite, QdrantFolder, QdrantEdge]
"""Every kind that needs no server."""

SHARED: list[type[Kind]] = [FaissFolder, MilvusLite, QdrantOverRest]
"""Kinds that an application can search while a migration goes on."""
