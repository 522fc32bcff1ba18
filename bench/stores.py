"""A backfill with an encoder that costs nothing, over what the store's own client can do at best.

The ceiling is a bare loop of the client, in the same run on the same collection: read everything with vectors and
payload, then write every vector, in batches of the size that suits each client. Undo log, stamps, checks and ledger
come on top of that in a backfill.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.backfill import DIM, EngineProject, open_backfill, run_whole
from bench.parts import timed_parts
from migrator.adapters.registry import open_store
from migrator.demo_stores import STORES, Gallery

BATCH = 5_000


class Store(ABC):
    """One kind of store, in a folder."""

    chunk_size = 5_000
    repeats = 3

    @contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        """While it lasts the server is there, for a kind that has one."""
        yield

    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @abstractmethod
    def fill(self, folder: Path, vectors: np.ndarray) -> None: ...

    @abstractmethod
    def ceiling(self, folder: Path, vectors: np.ndarray) -> tuple[float, float]:
        """Seconds for reading everything and for writing every vector."""


class DemoStore(Store):
    """A kind that the demo knows too."""

    kind: str

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(STORES[self.kind].settings)
        return settings

    def fill(self, folder: Path, vectors: np.ndarray) -> None:
        names = [str(number) for number in range(len(vectors))]
        STORES[self.kind].fill(folder, Gallery(list(range(len(vectors))), names, ["0"] * len(vectors), vectors))


class Faiss(DemoStore):
    kind = "faiss"

    def ceiling(self, folder: Path, vectors: np.ndarray) -> tuple[float, float]:
        import faiss

        file = str(folder / "gallery" / "index.faiss")

        def write() -> None:
            index = faiss.IndexFlatIP(DIM)
            index.add(vectors)
            faiss.write_index(index, file)

        return timed(lambda: STORES["faiss"].read(folder)), timed(write)


def milvus_ceiling(client: Any, vectors: np.ndarray, *, page: int, partial: bool) -> tuple[float, float]:
    def read() -> None:
        last = -1
        while rows := client.query(
            "digits", filter=f"id > {last}", limit=page, output_fields=["*"], iterator="True", strict_float32=True
        ):
            last = max(row["id"] for row in rows)

    def write() -> None:
        for block in blocks(len(vectors)):
            # A server that cannot change single fields is given whole rows.
            rest = {} if partial else {"digit": "0"}
            rows = [
                {"id": row, "embedding": vectors[row], **rest, **({} if partial else {"path": str(row)})}
                for row in block
            ]
            client.upsert("digits", rows, **({"partial_update": True} if partial else {}))

    return timed(read), timed(write)


class MilvusLite(DemoStore):
    kind = "milvus"

    def ceiling(self, folder: Path, vectors: np.ndarray) -> tuple[float, float]:
        from milvus_lite import server_manager_instance
        from pymilvus import MilvusClient

        client = MilvusClient(str(folder / "milvus.db"))
        client.load_collection("digits")
        found = milvus_ceiling(client, vectors, page=50_000, partial=True)

        def let_go() -> None:
            client.close()
            server_manager_instance.release_server(str(folder / "milvus.db"))

        # Letting go writes out what lies in memory, which a backfill does too at its end.
        return found[0], found[1] + timed(let_go)


class MilvusServer(Store):
    """A real one, of the wheel that the tests use."""

    chunk_size = 10_000
    """Each chunk waits three times for what was written before it: fewer of them wait less."""
    uri: str

    @contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        from tests.milvus_server import AS_IT_COMES, milvus_server

        with milvus_server(folder / "server", **AS_IT_COMES) as server:
            self.uri = server.uri
            yield

    def settings(self) -> dict[str, Any]:
        return {"kind": "milvus", "uri": self.uri, "collection": "digits"}

    def fill(self, folder: Path, vectors: np.ndarray) -> None:
        from pymilvus import MilvusClient

        from migrator.demo_stores import make_milvus_collection

        with closing(MilvusClient(self.uri)) as client:
            if client.has_collection("digits"):
                client.drop_collection("digits")
            make_milvus_collection(client, vectors.shape[1])
            for block in blocks(len(vectors)):
                client.insert(
                    "digits",
                    [{"id": row, "embedding": vectors[row], "path": str(row), "digit": "0"} for row in block],
                )
            client.query("digits", filter="", output_fields=["count(*)"], consistency_level="Strong")

    def ceiling(self, folder: Path, vectors: np.ndarray) -> tuple[float, float]:
        from pymilvus import MilvusClient

        with closing(MilvusClient(self.uri)) as client:
            return milvus_ceiling(client, vectors, page=4_000, partial=False)


class QdrantLocal(DemoStore):
    kind = "qdrant"
    repeats = 1  # of two minutes

    def ceiling(self, folder: Path, vectors: np.ndarray) -> tuple[float, float]:
        from qdrant_client import QdrantClient, models

        with closing(QdrantClient(path=str(folder / "qdrant"))) as client:

            def read() -> None:
                offset: Any = None
                while True:
                    _, offset = client.scroll("digits", limit=20_000, offset=offset, with_vectors=True)
                    if offset is None:
                        return

            def write() -> None:
                for block in blocks(len(vectors)):
                    points = [models.PointVectors(id=row, vector=vectors[row].tolist()) for row in block]
                    client.update_vectors("digits", points)

            return timed(read), timed(write)


class QdrantEdge(Store):
    def settings(self) -> dict[str, Any]:
        return {"kind": "qdrant", "engine": "edge", "path": "./qdrant-edge", "collection": "digits"}

    def fill(self, folder: Path, vectors: np.ndarray) -> None:
        import qdrant_edge as edge

        place = folder / "qdrant-edge" / "digits"
        place.mkdir(parents=True)
        params = edge.EdgeVectorParams(vectors.shape[1], edge.Distance.Cosine)
        shard = edge.EdgeShard.create(str(place), edge.EdgeConfig(vectors=params))
        for block in blocks(len(vectors)):
            points = [edge.Point(row, vectors[row], {"path": str(row), "digit": "0"}) for row in block]
            shard.update(edge.UpdateOperation.upsert_points(points))
        shard.flush()
        shard.close()

    def ceiling(self, folder: Path, vectors: np.ndarray) -> tuple[float, float]:
        import qdrant_edge as edge

        shard = edge.EdgeShard.load(str(folder / "qdrant-edge" / "digits"))

        def read() -> None:
            offset: Any = None
            while True:
                request = edge.ScrollRequest(limit=BATCH, offset=offset, with_payload=True, with_vector=True)
                records, offset = shard.scroll(request)
                _ = [record.vector for record in records]  # they come to Python when they are asked for
                if offset is None:
                    return

        def write() -> None:
            for block in blocks(len(vectors)):
                points = [edge.PointVectors(row, vectors[row].tolist()) for row in block]
                shard.update(edge.UpdateOperation.update_vectors(points))
            shard.flush()

        found = timed(read), timed(write)
        shard.close()
        return found


KINDS: dict[str, type[Store]] = {
    "faiss": Faiss,
    "qdrant-edge": QdrantEdge,
    "qdrant": QdrantLocal,
    "milvus-lite": MilvusLite,
    "milvus": MilvusServer,
}


def blocks(items: int) -> Iterator[range]:
    for start in range(0, items, BATCH):
        yield range(start, min(start + BATCH, items))


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def unit_vectors(items: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((items, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def configure(store: Store, folder: Path) -> Path:
    encoder = {"arch": "none", "dim": DIM, "image_size": 32, "weights": "none.safetensors"}
    migration = {
        "store": store.settings(),
        "images": {"root": "."},
        "old_encoder": dict(encoder),
        "new_encoder": dict(encoder),
        "verify": {"label": "{path}"},
        # The engine is timed, not the look at the collection that follows a run.
        "backfill": {
            "chunk_size": store.chunk_size,
            "batch_size": 256,
            "image_threads": 2,
            "read_back": 0,
            "measure": False,
        },
    }
    config = folder / "migrations.yaml"
    config.write_text(yaml.safe_dump({"version": 1, "migrations": {"bench": migration}}))
    return config


def once(kind: str, items: int) -> dict[str, Any]:
    store, vectors = KINDS[kind](), unit_vectors(items)
    with tempfile.TemporaryDirectory() as name, store.running(Path(name)):
        folder = Path(name)
        store.fill(folder, vectors)
        read, write = store.ceiling(folder, vectors)
        with EngineProject.open(configure(store, folder)) as project:
            open_backfill(project, "projection")
            with closing(open_store(project.settings.store.settings(), write=False)) as opened:
                adapter = type(opened)
            with timed_parts(adapter) as parts:
                summary, seconds = run_whole(project)
    assert summary.items == items, summary
    return {"client read": read, "client write": write, "backfill": seconds, **parts}


def measure(kind: str, items: int) -> dict[str, Any]:
    runs = [once(kind, items) for _ in range(KINDS[kind].repeats)]
    ratios = [(run["client read"] + run["client write"]) / run["backfill"] for run in runs]
    median = {what: round(statistics.median(run[what] for run in runs), 2) for what in runs[0]}
    return {
        "store": kind,
        "items": items,
        "dim": DIM,
        "chunk_size": KINDS[kind].chunk_size,
        "seconds": median,
        "vectors_per_second": round(items / median["backfill"]),
        "shares_of_ceiling": [round(ratio, 2) for ratio in sorted(ratios)],
        "share_of_ceiling": round(statistics.median(ratios), 2),
    }


def stores(items: int = 50_000, kinds: tuple[str, ...] = tuple(KINDS)) -> list[dict[str, Any]]:
    found = []
    for kind in kinds:
        found.append(measure(kind, items))
        print(found[-1], flush=True)
    return found
