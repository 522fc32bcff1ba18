"""The demo's gallery in each kind of store, embedded in each case, written and read with the store's own client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pymilvus import MilvusClient


class Gallery(NamedTuple):
    """What a store holds, row by row."""

    ids: Sequence[int]
    paths: Sequence[str]
    digits: Sequence[str]
    vectors: NDArray[np.float32]  # (n, dim)


class DemoStore(NamedTuple):
    """One kind of store."""

    settings: str
    """The `store` section of migrations.yaml."""
    fill: Callable[[Path, Gallery], None]
    read: Callable[[Path], Gallery]


def _fill_faiss(folder: Path, gallery: Gallery) -> None:
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = faiss.IndexFlatIP(gallery.vectors.shape[1])
    index.add(gallery.vectors)
    (folder / "gallery").mkdir()
    faiss.write_index(index, str(folder / "gallery" / "index.faiss"))
    items = pa.table({"id": gallery.ids, "path": gallery.paths, "digit": gallery.digits})
    pq.write_table(items, folder / "gallery" / "items.parquet")


def _read_faiss(folder: Path) -> Gallery:
    import faiss
    import pyarrow.parquet as pq

    index = faiss.read_index(str(folder / "gallery" / "index.faiss"))
    items = pq.read_table(folder / "gallery" / "items.parquet")
    ids, paths, digits = (items.column(name).to_pylist() for name in ("id", "path", "digit"))
    return Gallery(ids, paths, digits, index.reconstruct_n(0, index.ntotal))


def make_milvus_collection(client: MilvusClient, dim: int) -> None:
    """The collection `digits`, empty, in Milvus Lite or on a server."""
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    schema.add_field("path", DataType.VARCHAR, max_length=100)
    schema.add_field("digit", DataType.VARCHAR, max_length=1)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 100})
    client.create_collection("digits", schema=schema, index_params=index)


def _fill_milvus(folder: Path, gallery: Gallery) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(str(folder / "milvus.db"))
    make_milvus_collection(client, gallery.vectors.shape[1])
    rows = [
        {"id": int(item), "embedding": vector, "path": path, "digit": digit}
        for item, path, digit, vector in zip(*gallery, strict=True)
    ]
    client.insert("digits", rows)
    _close_milvus(folder, client)


def _read_milvus(folder: Path) -> Gallery:
    from pymilvus import MilvusClient

    client = MilvusClient(str(folder / "milvus.db"))
    client.load_collection("digits")
    rows = sorted(
        client.query("digits", filter="id >= 0", output_fields=["*"], limit=16_384), key=lambda row: int(row["id"])
    )
    found = Gallery(
        [row["id"] for row in rows],
        [row["path"] for row in rows],
        [row["digit"] for row in rows],
        np.array([row["embedding"] for row in rows], np.float32),
    )
    _close_milvus(folder, client)
    return found


def _close_milvus(folder: Path, client: object) -> None:
    from milvus_lite import server_manager_instance

    client.close()  # type: ignore[attr-defined]
    server_manager_instance.release_server(str(folder / "milvus.db"))


def _fill_qdrant(folder: Path, gallery: Gallery) -> None:
    from qdrant_client import QdrantClient, models

    with closing(QdrantClient(path=str(folder / "qdrant"))) as client:
        params = models.VectorParams(size=gallery.vectors.shape[1], distance=models.Distance.COSINE)
        client.create_collection("digits", params)
        points = [
            models.PointStruct(id=int(item), vector=vector.tolist(), payload={"path": path, "digit": digit})
            for item, path, digit, vector in zip(*gallery, strict=True)
        ]
        client.upsert("digits", points)


def _read_qdrant(folder: Path) -> Gallery:
    from qdrant_client import QdrantClient

    with closing(QdrantClient(path=str(folder / "qdrant"))) as client:
        records, _ = client.scroll("digits", limit=100_000, with_payload=True, with_vectors=True)
        payloads = [record.payload or {} for record in records]
        return Gallery(
            [int(record.id) for record in records],
            [payload["path"] for payload in payloads],
            [payload["digit"] for payload in payloads],
            np.array([record.vector for record in records], np.float32),
        )


STORES = {
    "faiss": DemoStore("{kind: faiss, path: ./gallery}", _fill_faiss, _read_faiss),
    "milvus": DemoStore("{kind: milvus, uri: ./milvus.db, collection: digits}", _fill_milvus, _read_milvus),
    "qdrant": DemoStore("{kind: qdrant, path: ./qdrant, collection: digits}", _fill_qdrant, _read_qdrant),
}
