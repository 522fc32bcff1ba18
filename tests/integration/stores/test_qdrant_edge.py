"""The Qdrant Edge adapter under the contract of all stores, and what is its own: folders, links, locks, damage."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
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

from migrator.adapters.base import ItemId, Page, Store, StoreBusy, StoreRejected, StoreUnavailable, Vectors
from migrator.adapters.qdrant.edge import EdgeStore
from migrator.adapters.qdrant.points import STAMP
from migrator.adapters.qdrant.shard import LOG_FILES, Folder, Shard
from migrator.adapters.registry import open_store
from migrator.adapters.testing import (
    DIM,
    Collection,
    Make,
    StoreContract,
    assert_same_page,
    payloads_of,
    unit_vectors,
    vectors_of,
)


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
        shard = self.folder.acquire(self.name)
        try:
            yield shard._edge
        finally:
            self.folder.release(shard)

    def add_alias(self) -> str:
        self.aliases.append(f"{self.name}_alias")
        (self.folder.path / self.aliases[0]).symlink_to(self.name)
        return self.aliases[0]

    def alias_leads_to(self) -> str:
        return (self.folder.path / self.aliases[0]).resolve().name

    def all_names(self) -> set[str]:
        return {file.name for file in self.folder.path.iterdir()}

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None:
        points = [
            edge.Point(item, {self.vector: vector} if self.vector else vector, payload)
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        with self.shard() as shard:
            shard.update(edge.UpdateOperation.upsert_points(points))

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        with self.shard() as shard:
            found: list[Any] = shard.retrieve(list(ids), True, False)
            payloads = {plain(record.id): record.payload for record in found}
        for payload in payloads.values():
            payload.pop(STAMP, None)
        self.insert(ids, vectors, [payloads[item] for item in ids])

    def delete(self, ids: Sequence[ItemId]) -> None:
        with self.shard() as shard:
            shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def visible(self) -> dict[ItemId, np.ndarray]:
        with self.shard() as shard:
            records, _ = shard.scroll(edge.ScrollRequest(limit=10_000, with_vector=True))
            vectors: dict[ItemId, Any] = {plain(found.id): found.vector for found in records}
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

    id_strategy: st.SearchStrategy[ItemId] = st.integers(0, 2**64 - 1)
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


# -- a folder ---------------------------------------------------------------------------------------------------------


IDS = list(range(20))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with the collection `products_v1` of 20 points, and its alias `products`."""
    path = tmp_path / "edge"
    path.mkdir()
    config = edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(DIM, edge.Distance.Cosine, hnsw_config=edge.HnswIndexConfig(8, 64, 10)),
        quantization_config=edge.ScalarQuantizationConfig(edge.ScalarType.Int8, quantile=0.99),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
    )
    create(path / "products_v1", config)
    Points(Folder(path), "products_v1", "").insert(IDS, unit_vectors(20), payloads_of(IDS))
    (path / "products").symlink_to("products_v1")
    return path


def opened(path: Path, collection: str = "products", *, write: bool = True, **settings: Any) -> Store:
    store = {"kind": "qdrant", "engine": "edge", "path": str(path), "collection": collection, **settings}
    return open_store(store, write=write)


def test_it_tells_what_it_is(path: Path) -> None:
    with closing(opened(path, write=False)) as store:
        info = store.describe()
        assert (info.collection_id, info.alias) == ("products_v1", "products")
        assert info.name == f"qdrant-edge:{path.resolve()}/products_v1"
        assert info.index == "HNSW m=8 ef_construct=64, scalar quantisation"
        assert info.server.startswith("qdrant-edge 0.")
        assert 10_000 < (info.bytes_on_disk or 0) < 10_000_000
        assert any("stop the application" in note for note in store.capabilities.notes)


def test_a_collection_like_it_keeps_every_setting_and_payload_index(path: Path) -> None:
    with closing(edge.EdgeShard.load(str(path / "products_v1"))) as shard:
        for field, schema in (
            ("price", edge.PayloadSchemaType.Float),
            ("path", edge.KeywordIndexParams(is_tenant=True)),
            (STAMP, edge.PayloadSchemaType.Keyword),
        ):
            shard.update(edge.UpdateOperation.create_field_index(field, schema))
    with closing(opened(path)) as store:
        store.create_like("products_v2", dim=2 * DIM).close()
    first, second = (
        json.loads((path / name / "edge_config.json").read_text()) for name in ("products_v1", "products_v2")
    )
    assert second["vectors"][""].pop("size") == 2 * first["vectors"][""].pop("size")
    assert first == second
    with closing(edge.EdgeShard.load(str(path / "products_v2"))) as shard:
        carried: Any = shard.info().payload_schema
    assert {field: index.data_type for field, index in carried.items()} == {
        "price": edge.PayloadSchemaType.Float,
        "path": edge.PayloadSchemaType.Keyword,
    }
    assert carried["path"].params.is_tenant
    assert sorted(found.name for found in path.iterdir()) == ["products", "products_v1", "products_v2"]


def test_the_cutover_builds_the_index(path: Path) -> None:
    ids = list(range(2000))
    rng = np.random.default_rng(0)
    stored: Any = rng.standard_normal((2000, DIM))
    Points(Folder(path), "products_v1", "").insert(ids, stored, payloads_of(ids))
    new = unit_vectors(2000, seed=1)
    with closing(opened(path)) as store:
        store.publish(final=True)
        assert store.write_vectors(ids, new, "new").written == ids
        store.publish(final=True)
        assert store.count(stamp="new") == len(ids)
        assert store.scan_ids(after=None, limit=10**6) == ids
        np.testing.assert_allclose(vectors_of(store, ids), new, atol=1e-6)
        exact = store.search(new[:50], 10, exact=True).ids
        fast = store.search(new[:50], 10).ids
    with closing(edge.EdgeShard.load(str(path / "products_v1"))) as shard:
        assert shard.info().indexed_vectors_count == len(ids)
    assert [row[0] for row in exact] == ids[:50]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, fast, strict=True)]) > 0.8


@pytest.mark.parametrize("left", ["products_v1", "products"])
def test_what_is_in_the_way_of_a_new_collection(path: Path, left: str) -> None:
    """A folder that is none, or a link; and what a killed call left is no obstacle."""
    (path / ".products_v2.new" / "segments").mkdir(parents=True)
    (path / "products_v3").mkdir()
    (path / "products_v3" / "notes.txt").touch()
    with closing(opened(path, left)) as store:
        store.create_like("products_v2", dim=DIM).close()
        assert not (path / ".products_v2.new").exists()
        assert not store.exists("products_v3")
        with pytest.raises(StoreRejected, match="products_v3 is in the way"):
            store.create_like("products_v3", dim=DIM)
        for name in ("../x", ".hidden", "", "a/b"):
            with pytest.raises(StoreRejected, match="plain name"):
                store.create_like(name, dim=DIM)
    assert (path / "products_v3" / "notes.txt").exists()


def test_what_a_killed_drop_left_is_swept(path: Path) -> None:
    shutil.copytree(path / "products_v1", path / ".products_v0.gone")
    opened(path, write=False).close()
    assert (path / ".products_v0.gone").exists()
    opened(path).close()
    assert not (path / ".products_v0.gone").exists()


def test_an_alias_may_lead_through_another(path: Path) -> None:
    (path / "shop").symlink_to("products")
    with closing(opened(path, "shop")) as store:
        assert (store.describe().collection_id, store.describe().alias) == ("products_v1", "shop")
        with pytest.raises(StoreRejected, match="alias"):
            store.drop()
        with closing(store.create_like("products_v2", dim=DIM)) as shadow:
            store.swap_alias("products", to="products_v2")
            with pytest.raises(StoreRejected, match="alias"):
                shadow.drop()
        store.drop()
    with closing(opened(path, "shop")) as store:
        assert store.describe().collection_id == "products_v2"
    assert (path / "products").readlink() == Path("products_v2")


def test_a_store_shares_its_collection_with_stores_opened_from_it(path: Path) -> None:
    with closing(opened(path)) as store:
        other = store.open_collection("products_v1")
        other.write_vectors(IDS, unit_vectors(20, seed=1), "new")
        other.close()
        assert store.count(stamp="new") == 20
    with closing(edge.EdgeShard.load(str(path / "products_v1"))) as shard:  # the last one let go of it
        assert shard.count(edge.CountRequest()) == 20


def test_a_payload_that_cannot_be_stored_is_that_items_problem(path: Path) -> None:
    payloads: list[dict[str, Any]] = [
        {"x": 1}, {"x": float("nan")}, {"x": "\ud800"}, {"x": [1, 2.5, None, {"y": "z"}]},
    ]  # fmt: skip
    with closing(opened(path)) as store:
        report = store.insert(_page([30, 31, 32, 33], payloads))
        assert (list(report.written), set(report.rejected)) == ([30, 33], {31, 32})
        assert all("\n" not in reason for reason in report.rejected.values())
        assert list(store.read_payloads([30, 31, 32, 33]).payloads) == payloads[::3]
        assert set(store.insert(_page([-1, "x"], [{}, {}])).rejected) == {-1, "x"}


def _page(ids: Sequence[ItemId], payloads: Sequence[dict[str, Any]]) -> Page:
    return Page(ids, unit_vectors(len(ids)), payloads, [None] * len(ids))


def test_payloads_go_through_a_write_as_they_are(path: Path) -> None:
    payload: dict[str, Any] = {
        "whole": 1, "float": 1.0, "big": 2**63 + 5, "least": -(2**63), "none": None, "yes": True, "": "no name",
        "a.b": [1, 2.5, "x", None, [], {}], "deep": {"a": {"b": [{}]}}, "text": 'é漢😀\0"', "small": 5e-324,
        "zero": -0.0,
    }  # fmt: skip
    Points(Folder(path), "products_v1", "").insert([1], unit_vectors(1), [payload])
    with closing(opened(path)) as store:
        for stamp in ("new", "newer", None):
            store.write_vectors([1], unit_vectors(1, seed=2), stamp)
            (found,) = store.read_payloads([1]).payloads
            assert repr(found) == repr(payload)
    with closing(edge.EdgeShard.load(str(path / "products_v1"))) as shard:
        assert repr(shard.retrieve([1], True, False)[0].payload) == repr(payload)


def test_a_page_that_knows_less_is_a_change(path: Path) -> None:
    """An item that `expected` does not hold, or whose vector was not a number."""
    odd = np.full((1, DIM), np.nan, np.float32)
    Points(Folder(path), "products_v1", "").insert([4], odd, payloads_of(IDS)[4:5])
    with closing(opened(path)) as store:
        page = store.read([3, 4])
        report = store.write_vectors([3, 4, 5], unit_vectors(3, seed=1), "new", expected=page)
        assert (list(report.written), list(report.changed)) == ([3, 4], [5])


def test_a_power_failure_loses_nothing_acknowledged(path: Path) -> None:
    """The log, which every write syncs, restores what the other files have not yet of it."""
    with closing(opened(path)) as store:
        store.publish()
        shutil.copytree(path / "products_v1", path / "products_v2")
        store.insert(_page([30, 31], [{"x": 1}, {"x": 2}]))
        store.write_vectors(IDS, unit_vectors(20, seed=1), "new")
        store.delete([5])
        shutil.rmtree(path / "products_v2" / "wal")
        shutil.copytree(path / "products_v1" / "wal", path / "products_v2" / "wal")
        expected = store.scan(after=None, limit=10**6)
    with closing(opened(path, "products_v2")) as store:
        assert_same_page(store.scan(after=None, limit=10**6), expected)
    assert (len(expected), list(expected.stamps).count("new")) == (21, 19)


def test_the_log_does_not_grow_for_ever(path: Path) -> None:
    with closing(opened(path)) as store:
        for turn in range(10):
            payloads = [{"turn": turn, "text": "x" * 5000}] * 5000
            store.insert(Page(range(5000), unit_vectors(5000, seed=turn), payloads, [None] * 5000))
            assert len(list((path / "products_v1" / "wal").iterdir())) <= LOG_FILES
        expected = store.scan(after=None, limit=10**6)
    with closing(opened(path)) as store:
        assert_same_page(store.scan(after=None, limit=10**6), expected)


# -- further vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "image"])
def test_further_vectors_stay_bit_for_bit(tmp_path: Path, name: str) -> None:
    path, rng = tmp_path, np.random.default_rng(0)
    create(
        path / "c",
        edge.EdgeConfig(
            vectors={
                name: edge.EdgeVectorParams(DIM, edge.Distance.Cosine),
                "text": edge.EdgeVectorParams(33, edge.Distance.Cosine),
                "half": edge.EdgeVectorParams(8, edge.Distance.Cosine, datatype=edge.VectorStorageDatatype.Float16),
                "turbo": edge.EdgeVectorParams(8, edge.Distance.Cosine, datatype=edge.VectorStorageDatatype.Turbo8),
                "many": edge.EdgeVectorParams(
                    4, edge.Distance.Dot, multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
                ),
            },
            sparse_vectors={"words": edge.EdgeSparseVectorParams()},
        ),
    )
    further = [
        {
            "text": rng.standard_normal(33),
            "half": rng.standard_normal(8),
            "turbo": rng.standard_normal(8),
            "many": rng.standard_normal((3, 4)).tolist(),
            "words": edge.SparseVector([1, 5], [0.5, 0.25]),
        }
        for _ in range(4)
    ]
    first = [{name: vector, **others} for vector, others in zip(unit_vectors(4), further, strict=True)]
    del first[3][name]  # a point without the vector is no item
    first[2] = {name: first[2][name]}
    points = [edge.Point(n, vector, {"path": f"{n}.png"}) for n, vector in enumerate(first)]
    with closing(edge.EdgeShard.load(str(path / "c"))) as shard:
        shard.update(edge.UpdateOperation.upsert_points(points))
        before = vectors_in(shard)
    with pytest.raises(StoreRejected, match="'turbo': name one with `vector`"):
        opened(path, "c")
    new = unit_vectors(4, seed=1)
    with closing(opened(path, "c", vector=name)) as store:
        assert (store.count(), store.scan_ids(after=None, limit=9)) == (3, [0, 1, 2])
        page = store.scan(after=None, limit=9)
        with pytest.raises(StoreRejected, match="in_place"):
            store.create_like("d", dim=DIM)
        report = store.write_vectors([0, 1, 2, 3], new, "s", expected=page)
        assert (report.written, report.deleted, report.changed) == ([0, 1, 2], [3], [])
        np.testing.assert_allclose(vectors_of(store, [0, 1, 2]), new[:3], atol=1e-6)
        assert store.count(stamp="s") == 3
    with closing(edge.EdgeShard.load(str(path / "c"))) as shard:
        after = vectors_in(shard)
    for item, vectors in before.items():
        assert {key: value for key, value in after[item].items() if key != name} == {
            key: value for key, value in vectors.items() if key != name
        }


def vectors_in(shard: edge.EdgeShard) -> dict[Any, dict[str, Any]]:
    records, _ = shard.scroll(edge.ScrollRequest(limit=100, with_vector=True))
    return {
        record.id: {
            key: (value.indices, value.values) if isinstance(value, edge.SparseVector) else value
            for key, value in (record.vector if isinstance(record.vector, dict) else {"": record.vector}).items()
        }
        for record in records
    }


@pytest.mark.parametrize("further", [False, True])
def test_an_unnamed_vector_beside_sparse_ones(tmp_path: Path, further: bool) -> None:
    config = edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(DIM, edge.Distance.Dot), sparse_vectors={"words": edge.EdgeSparseVectorParams()}
    )
    create(tmp_path / "c", config)
    words = {"words": edge.SparseVector([7], [0.5])} if further else {}
    with closing(edge.EdgeShard.load(str(tmp_path / "c"))) as shard:
        shard.update(edge.UpdateOperation.upsert_points([edge.Point(1, {"": unit_vectors(1)[0], **words})]))
    with closing(opened(tmp_path, "c")) as store:
        assert store.write_vectors([1], unit_vectors(1, seed=1), "s").written == [1]
        np.testing.assert_array_equal(store.read_vectors([1]).vectors, unit_vectors(1, seed=1))
    with closing(edge.EdgeShard.load(str(tmp_path / "c"))) as shard:
        (record,) = shard.retrieve([1], False, True)
    stored: Any = record.vector
    assert isinstance(stored, dict) == further
    if further:
        assert stored["words"].values == [0.5]


# -- what cannot be opened --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"collection": "produkts"}, "no collection or alias 'produkts', there are products, products_v1: correct"),
        ({"collection": "../edge/products"}, "plain name"),
        ({"collection": "notes"}, "notes is not a shard"),
        ({"collection": "dangling"}, "leads nowhere"),
        ({"collection": "circle"}, "leads nowhere"),
        ({"collection": "elsewhere"}, "beside it"),
        ({"path": "nowhere"}, "nowhere does not exist: correct `path`"),
        ({"path": "file"}, "file is not a folder: correct `path`"),
        ({"path": "edge/products_v1"}, "products_v1 is a shard: set `path` to .*edge and `collection` to products_v1"),
        ({"path": "empty"}, "the folder has no collections"),
        ({"vector": "image"}, "no vector 'image', but ''"),
        ({"engine": "fast"}, "local or edge, not 'fast'"),
        ({"grpc": True}, "remove `grpc`"),
        ({"colection": "x"}, "no setting 'colection'"),
    ],
)
def test_what_cannot_be_opened(path: Path, change: dict[str, Any], says: str) -> None:
    (path / "dangling").symlink_to("nowhere")
    (path / "circle").symlink_to("circle2")
    (path / "circle2").symlink_to("circle")
    (path / "elsewhere").symlink_to(path.parent)
    (path.parent / "empty").mkdir()
    (path.parent / "file").touch()
    if change.get("collection") == "notes":
        (path / "notes").mkdir()
    if "path" in change:
        change = {"path": str(path.parent / change["path"])}
    settings = {"kind": "qdrant", "engine": "edge", "path": str(path), "collection": "products", **change}
    before = sorted(path.parent.glob("*/*"))
    with pytest.raises(StoreRejected, match=says) as refusal:
        open_store(settings, write=True)
    assert "\n" not in str(refusal.value)
    assert sorted(path.parent.glob("*/*")) == before


def test_a_server_is_not_for_this_engine() -> None:
    settings = {"kind": "qdrant", "engine": "edge", "url": "http://localhost:6333", "collection": "c"}
    with pytest.raises(StoreRejected, match="remove `url`"):
        open_store(settings, write=True)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"vectors": {name: edge.EdgeVectorParams(4, edge.Distance.Dot) for name in "ab"}}, "'a', 'b': name one"),
        ({"sparse_vectors": {"words": edge.EdgeSparseVectorParams()}}, "no dense vectors"),
        ({"vectors": edge.EdgeVectorParams(4, edge.Distance.Manhattan)}, "distance Manhattan"),
        (
            {
                "vectors": edge.EdgeVectorParams(
                    4, edge.Distance.Dot, multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
                )
            },
            "multi-vectors",
        ),
        (
            {"vectors": edge.EdgeVectorParams(4, edge.Distance.Dot, datatype=edge.VectorStorageDatatype.Uint8)},
            "keeps its vectors as uint8",
        ),
        ({"vectors": edge.EdgeVectorParams(4, edge.Distance.Dot), "wal_enabled": False}, "no write-ahead log"),
        (
            {
                "vectors": edge.EdgeVectorParams(4, edge.Distance.Dot),
                "optimizers": edge.EdgeOptimizersConfig(prevent_unoptimized=True),
            },
            "prevent_unoptimized",
        ),
    ],
)
def test_collections_that_cannot_be_migrated(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    create(tmp_path / "c", edge.EdgeConfig(**config))
    for _ in range(2):  # and a refusal holds nothing open
        with pytest.raises(StoreRejected, match=says) as refusal:
            opened(tmp_path, "c")
        assert "\n" not in str(refusal.value)
    edge.EdgeShard.load(str(tmp_path / "c")).close()


@pytest.mark.parametrize(
    "file",
    [
        "edge_config.json", "segments/*/segment.json", "segments/*/payload_storage/bitmask.dat", "wal/open-1",
        "segments/*/vector_storage/vectors/status.dat",  # for which the engine panics
    ],
)  # fmt: skip
def test_a_damaged_collection(path: Path, file: str) -> None:
    (damaged,) = (path / "products_v1").glob(file)
    if "wal" in file:
        damaged.write_bytes(b"\xff" * 64)
    else:
        os.truncate(damaged, damaged.stat().st_size // 2)
    with pytest.raises(StoreRejected, match="products_v1 is damaged, or of another version: put a backup") as refusal:
        opened(path)
    assert "\n" not in str(refusal.value)


def test_it_needs_no_other_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qdrant_client", "grpc", "faiss"):
        monkeypatch.setitem(sys.modules, name, None)
    with closing(opened(path)) as store:
        assert store.describe().count == 20


def test_without_the_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)
    with pytest.raises(StoreRejected, match=r"pip install 'advbct-migrator\[qdrant-edge\]'"):
        opened(path)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("failed to open WAL x: Can't init WAL: Kind(WouldBlock)", StoreBusy),
        ("IO Error: No space left on device (os error 28)", StoreUnavailable),
        ("IO Error: Input/output error (os error 5)", StoreUnavailable),
        ("No space left on device: WAL buffer size exceeds available disk space", StoreUnavailable),
        ("IO Error: Permission denied (os error 13)", StoreRejected),
        ("Vector dimension error: expected dim: 8, got 9", StoreRejected),
    ],
)
def test_what_the_engine_says(path: Path, said: str, kind: type[Exception]) -> None:
    with closing(Shard(path / "products_v1")) as shard:

        def fails(edge: Any) -> None:
            raise Exception(f"Service runtime error: {said}")  # the engine has no better one

        with pytest.raises(kind) as problem:
            shard.ask(fails)
    assert "products_v1" in str(problem.value)


# -- other processes --------------------------------------------------------------------------------------------------


LOCKED = "folder = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)"
LOADED = """shard = qdrant_edge.EdgeShard.load(sys.argv[1])
for vector in [0.5] * 16, [0.25] * 16:
    points = [qdrant_edge.Point(item, vector, {"text": "x" * item}) for item in range(100)]
    shard.update(qdrant_edge.UpdateOperation.upsert_points(points))
    shard.flush()"""


@pytest.mark.parametrize("holds", [LOCKED, LOADED], ids=["by our lock", "by the engine's"])
def test_another_process_has_it_open(path: Path, holds: str) -> None:
    """The engine would touch the files of whoever has them open before it looks at its lock."""
    place = path / "products_v1"
    code = f"import fcntl, os, sys, qdrant_edge\n{holds}\nprint('open', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in place.rglob("*")}
        for write in (False, True):
            with pytest.raises(StoreBusy, match="products_v1 is open in another process: stop") as refusal:
                opened(path, write=write)
            assert "\n" not in str(refusal.value)
        assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in place.rglob("*")} == before
    opened(path).close()


def test_a_lock_is_taken_for_as_long_as_the_store_is_open(path: Path) -> None:
    folder = os.open(path / "products", os.O_RDONLY)
    try:
        with closing(opened(path)), pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


WRITER = """
import sys
from migrator.adapters.registry import open_store
from migrator.adapters.testing import unit_vectors
store = open_store({"kind": "qdrant", "engine": "edge", "path": sys.argv[1], "collection": "products"}, write=True)
for turn in range(int(sys.argv[2]), 10**6):
    vectors = unit_vectors(2000, seed=turn)
    for start in range(0, 2000, 500):
        store.write_vectors(range(start, start + 500), vectors[start : start + 500], str(turn))
        sys.stdout.write(f"{turn} {start}\\n")  # in one piece, also without buffers: a kill must not tear it
        sys.stdout.flush()
    if turn % 3 == 0:
        store.publish(final=True)
"""


@pytest.mark.crash
def test_a_killed_writer_leaves_no_vector_with_another_ones_stamp(path: Path) -> None:
    """Nor does it lose what was acknowledged, or tear a batch."""
    ids = list(range(2000))
    Points(Folder(path), "products_v1", "").insert(ids, unit_vectors(2000), payloads_of(ids))
    rng = np.random.default_rng(1)
    holds = dict.fromkeys(range(0, 2000, 500), 0)
    for cycle in range(1, 13):
        following = dict.fromkeys(holds, 1000 * cycle)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(1000 * cycle)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            killer = threading.Timer(rng.uniform(0, 0.6), process.kill)
            for line in process.stdout:
                if killer.ident is None:
                    killer.start()
                turn, start = map(int, line.split())
                holds[start], following[start] = turn, turn + 1
            killer.join()
        assert process.returncode == -signal.SIGKILL
        with closing(opened(path)) as store:
            page = store.scan(after=None, limit=10**6)
        assert list(page.ids) == ids
        assert list(page.payloads) == payloads_of(ids)
        turns = [int(stamp or 0) for stamp in page.stamps]
        vectors = {turn: unit_vectors(2000, seed=turn) for turn in set(turns)}
        expected = np.array([vectors[turn][row] for row, turn in enumerate(turns)])
        np.testing.assert_allclose(page.vectors, expected, atol=1e-6)
        for start in holds:
            assert len(set(turns[start : start + 500])) == 1
            assert turns[start] in (holds[start], following[start])
            holds[start] = turns[start]
