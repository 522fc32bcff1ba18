"""A backfill with an encoder that costs nothing, over what the store's own client can do at best.

The ceiling is a bare loop of the client, in the same run on the same collection: read everything with vectors and
payload, then write every vector, in batches of the size that facts of each client favour. Undo log, stamps, checks
and ledger come on top of that in a backfill.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.backfill import DIM, EngineProject, open_backfill, run_whole
from migrator.demo_stores import STORES, Gallery

CHUNK = 5_000


def measure(kind: str, items: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors = np.random.default_rng(0).standard_normal((items, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        paths = [str(number) for number in range(items)]
        STORES[kind].fill(folder, Gallery(list(range(items)), paths, ["0"] * items, vectors))
        read, write = CEILINGS[kind](folder, vectors)
        encoder = {"arch": "none", "dim": DIM, "image_size": 32, "weights": "none.safetensors"}
        migration = {
            "store": yaml.safe_load(STORES[kind].settings),
            "images": {"root": "."},
            "old_encoder": dict(encoder),
            "new_encoder": dict(encoder),
            "verify": {"label": "{path}"},
            "backfill": {"chunk_size": CHUNK, "batch_size": 256, "image_threads": 2},
        }
        (folder / "migrations.yaml").write_text(yaml.safe_dump({"version": 1, "migrations": {"bench": migration}}))
        with EngineProject.open(folder / "migrations.yaml") as project:
            open_backfill(project, "projection")
            summary, seconds = run_whole(project)
        assert summary.items == items, summary
        return {
            "store": kind,
            "items": items,
            "dim": DIM,
            "client_read_seconds": round(read, 2),
            "client_write_seconds": round(write, 2),
            "backfill_seconds": round(seconds, 2),
            "encoder_seconds": round(summary.encoding_seconds, 2),
            "vectors_per_second": round(items / seconds),
            "share_of_ceiling": round((read + write) / seconds, 2),
        }


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def faiss_ceiling(folder: Path, vectors: np.ndarray) -> tuple[float, float]:
    import faiss

    file = str(folder / "gallery" / "index.faiss")

    def write() -> None:
        index = faiss.IndexFlatIP(DIM)
        index.add(vectors)
        faiss.write_index(index, file)

    return timed(lambda: STORES["faiss"].read(folder)), timed(write)


def milvus_ceiling(folder: Path, vectors: np.ndarray) -> tuple[float, float]:
    from milvus_lite import server_manager_instance
    from pymilvus import MilvusClient

    client = MilvusClient(str(folder / "milvus.db"))
    client.load_collection("digits")

    def read() -> None:
        last = -1
        while rows := client.query(
            "digits", filter=f"id > {last}", limit=16_000, output_fields=["*"], iterator="True", strict_float32=True
        ):
            last = max(row["id"] for row in rows)

    def write() -> None:
        for start in range(0, len(vectors), CHUNK):
            rows = [{"id": row, "embedding": vectors[row]} for row in range(start, min(start + CHUNK, len(vectors)))]
            client.upsert("digits", rows, partial_update=True)
        # Part of writing: it moves the rows into its files and their index when it lets go of them.
        client.close()
        server_manager_instance.release_server(str(folder / "milvus.db"))

    return timed(read), timed(write)


def qdrant_ceiling(folder: Path, vectors: np.ndarray) -> tuple[float, float]:
    from qdrant_client import QdrantClient, models

    with closing(QdrantClient(path=str(folder / "qdrant"))) as client:

        def read() -> None:
            offset: Any = None
            while True:
                _, offset = client.scroll("digits", limit=20_000, offset=offset, with_vectors=True)
                if offset is None:
                    return

        def write() -> None:
            for start in range(0, len(vectors), CHUNK):
                points = [
                    models.PointVectors(id=row, vector=vectors[row].tolist())
                    for row in range(start, min(start + CHUNK, len(vectors)))
                ]
                client.update_vectors("digits", points)

        return timed(read), timed(write)


CEILINGS: dict[str, Callable[[Path, np.ndarray], tuple[float, float]]] = {
    "faiss": faiss_ceiling,
    "milvus": milvus_ceiling,
    "qdrant": qdrant_ceiling,
}


def stores(items: int = 20_000) -> list[dict[str, Any]]:
    return [measure(kind, items) for kind in CEILINGS]
