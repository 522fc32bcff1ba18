"""The Qdrant Edge adapter under the contract of all stores, and what is its own: folders, links, locks, damage."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge
from hypothesis import strategies as st

from adapters.base import ItemId, Store, StoreBusy, Vectors
from adapters.qdrant import STAMP
from adapters.qdrant_edge import EdgeStore, Folder
from adapters.registry import open_store
from tests.integration.stores.contract import DIM, Collection, Make, StoreContract


@dataclass
class Points(Collection):
    """A collection that the application reaches through the same shard, as a second process never could."""

    folder: Folder
    name: str
    vector: str
    aliases: list[str] = field(default_factory=list)

    def open(self, *, write: bool = True) -> Store:
        name = self.aliases[0] if self.aliases else self.name
        return EdgeStore(self.folder, name, vector=self.vector or None, write=write)

    @contextmanager
    def shard(self) -> Iterator[edge.EdgeShard]:
        shard = self.folder.take(self.name)
        try:
            yield shard._edge
        finally:
            self.folder.let_go(shard)

    def add_alias(self) -> str:
        self.aliases.append(f"{self.name}_alias")
        (self.folder.path / self.aliases[0]).symlink_to(self.name)
        return self.aliases[0]

    def alias_leads_to(self) -> str:
        return (self.folder.path / self.aliases[0]).resolve().name

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None:
        points = [
            edge.Point(item, {self.vector: vector} if self.vector else vector, payload)
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        with self.shard() as shard:
            shard.update(edge.UpdateOperation.upsert_points(points))

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        with self.shard() as shard:
            payloads = {plain(found.id): found.payload for found in shard.retrieve(list(ids), True, False)}
        for payload in payloads.values():
            payload.pop(STAMP, None)
        self.insert(ids, vectors, [payloads[item] for item in ids])

    def delete(self, ids: Sequence[ItemId]) -> None:
        with self.shard() as shard:
            shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def visible(self) -> dict[ItemId, np.ndarray]:
        with self.shard() as shard:
            records, _ = shard.scroll(edge.ScrollRequest(limit=10_000, with_vector=True))
            vectors = {plain(found.id): found.vector for found in records}
        return {item: np.array(v[self.vector] if self.vector else v, np.float32) for item, v in vectors.items()}


def plain(item: Any) -> ItemId:
    return item if isinstance(item, int) else str(item)


NUMBER = itertools.count()


def made_in(path: Path, distance: edge.Distance, vector: str) -> Make:
    folder = Folder(path)

    def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Points:
        name = f"test_{next(NUMBER)}"
        params = edge.EdgeVectorParams(DIM, distance)
        create(path / name, edge.EdgeConfig(vectors={vector: params} if vector else params))
        points = Points(folder, name, vector)
        points.insert(ids, vectors, payloads)
        return points

    return make


def create(place: Path, config: edge.EdgeConfig) -> None:
    place.mkdir()
    edge.EdgeShard.create(str(place), config).close()


class EdgeContract(StoreContract):
    """Integers are unsigned in Qdrant."""

    id_strategy = st.integers(0, 2**64 - 1)
    arriving = (3, 1001)
    missing = "ffffffff-ffff-4fff-8fff-ffffffffffff"
    arriving_strings = ("00000000-0000-4000-8000-000000000000", "ffffffff-ffff-4fff-8fff-fffffffffffe")

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        return [int(item) for item in np.random.default_rng(7).permutation(np.arange(4, 404, 2))]

    def test_a_second_writer(self, collection: Collection, store: Store, ids: list[ItemId]) -> None:
        """The engine's lock keeps readers out too."""
        assert isinstance(collection, Points)
        settings = {"kind": "qdrant", "engine": "edge", "path": str(collection.folder.path)}
        for write in (False, True):
            with pytest.raises(StoreBusy, match="another process") as refusal:
                open_store({**settings, "collection": collection.name}, write=write)
            assert "\n" not in str(refusal.value)
        store.close()
        with closing(open_store({**settings, "collection": collection.name}, write=False)) as reader:
            assert reader.count() == len(ids)


@pytest.mark.parametrize(
    ("distance", "vector"),
    [(edge.Distance.Cosine, ""), (edge.Distance.Dot, "image"), (edge.Distance.Euclid, "")],
    ids=["cosine", "dot-named", "euclid"],
)
class TestIntegers(EdgeContract):
    @pytest.fixture
    def make(self, tmp_path: Path, distance: edge.Distance, vector: str) -> Make:
        return made_in(tmp_path, distance, vector)


class TestUuids(EdgeContract):
    id_strategy = st.uuids().map(str)

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        rng = np.random.default_rng(3)
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(200)]

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        return made_in(tmp_path, edge.Distance.Cosine, "")


class TestIntegersAndUuids(EdgeContract):
    """Both in one collection."""

    id_strategy = st.integers(0, 2**64 - 1) | st.uuids().map(str)

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        return made_in(tmp_path, edge.Distance.Cosine, "")
