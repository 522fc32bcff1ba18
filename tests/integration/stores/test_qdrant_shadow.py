"""What a second collection of Qdrant's takes over from the first: every setting, every vector. The values that are
compared are those that qdrant_client, or qdrant_edge, gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from migrator.adapters.base import Page, Sparse, Store, StoreRejected, with_further
from migrator.adapters.qdrant.connection import Connection
from migrator.adapters.qdrant.store import QdrantStore
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, unit_vectors
from tests.qdrant_front import Front, qdrant_front
from tests.qdrant_grpc import grpc_door

IDS = list(range(8))
OLD, NEW = unit_vectors(8), unit_vectors(8, seed=1)
OTHER = models.VectorParams(size=3, distance="Dot", on_disk=True, datatype="float16")
TOKENS = models.VectorParams(
    size=2, distance="Cosine", multivector_config=models.MultiVectorConfig(comparator="max_sim")
)
WORDS = models.SparseVectorParams(
    modifier="idf", index=models.SparseIndexParams(full_scan_threshold=77, on_disk=True, datatype="float16")
)
SETTINGS: dict[str, Any] = {  # every setting that a collection can be created with
    "vectors": {
        "image": models.VectorParams(
            size=DIM,
            distance="Dot",
            on_disk=True,
            datatype="float32",
            hnsw_config=models.HnswConfigDiff(m=7, payload_m=5, on_disk=True),
            quantization_config=models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True)),
        ),
        "other": OTHER,
        "tokens": TOKENS,
    },
    "sparse_vectors": {"words": WORDS},
    "shard_number": 2,
    "sharding_method": models.ShardingMethod.AUTO,
    "replication_factor": 3,
    "write_consistency_factor": 2,
    "on_disk_payload": False,
    "payload": models.PayloadStorageParams(memory="cached"),
    "id_tracker": models.IdTrackerParams(memory="pinned"),
    "hnsw_config": models.HnswConfigDiff(m=24, ef_construct=77, full_scan_threshold=1234, max_indexing_threads=2),
    "wal_config": models.WalConfigDiff(wal_capacity_mb=64, wal_segments_ahead=1),
    "optimizers_config": models.OptimizersConfigDiff(indexing_threshold=123, default_segment_number=4),
    "quantization_config": models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type="int8", quantile=0.9)),
    "strict_mode_config": models.StrictModeConfig(
        enabled=True,
        search_max_oversampling=4.5,
        multivector_config={"tokens": models.StrictModeMultivector(max_vectors=32)},
        sparse_config={"words": models.StrictModeSparse(max_length=300)},
    ),
    "metadata": {"owner": "shop", "made": {"by": "loader 7", "at": [2024, 5.0]}, "none": None},
}
LATE = {"read_fan_out_factor": 2, "read_fan_out_delay_ms": 15}
INDEXES: dict[str, Any] = {
    "shop": models.KeywordIndexParams(type="keyword", is_tenant=True, on_disk=True),
    "price": models.IntegerIndexParams(type="integer", lookup=False, range=True, is_principal=True),
    "rating": models.PayloadSchemaType.FLOAT,
    "when": models.DatetimeIndexParams(type="datetime", is_principal=True),
    "number": models.UuidIndexParams(type="uuid", is_tenant=True),
    "place": models.GeoIndexParams(type="geo", on_disk=True),
    "sold": models.BoolIndexParams(type="bool"),
    "name": models.TextIndexParams(
        type="text", tokenizer="prefix", min_token_len=2, max_token_len=9, lowercase=True, stopwords="english"
    ),
    "metadata.source": models.PayloadSchemaType.KEYWORD,
}


@dataclass
class Place:
    """The collection `d` with an application's client."""

    client: QdrantClient
    settings: dict[str, Any] | None = None
    front: Front | None = None
    opened: list[Store] = field(default_factory=list)

    def create(self, name: str = "d", **changes: Any) -> None:
        settings = {**SETTINGS, **changes}
        renamed = {"vectors": "vectors_config", "sparse_vectors": "sparse_vectors_config"}
        self.client.create_collection(name, **{renamed.get(key, key): value for key, value in settings.items()})
        if self.front is not None:
            self.client.update_collection(name, collection_params=models.CollectionParamsDiff(**LATE))
            for key, schema in INDEXES.items():
                self.client.create_payload_index(name, key, field_schema=schema)

    def open(self, name: str = "d", vector: str | None = "image", *, write: bool = True) -> Store:
        if self.settings is None:
            store: Store = QdrantStore(
                Connection(self.client, "memory", local=True, keep=True), name, vector=vector, write=write
            )
        else:
            named = {} if vector is None else {"vector": vector}
            store = open_store({"kind": "qdrant", "collection": name, **self.settings, **named}, write=write)
        self.opened.append(store)
        return store

    def names(self) -> set[str]:
        return {found.name for found in self.client.get_collections().collections}


@pytest.fixture
def memory() -> Iterator[Place]:
    with closing(QdrantClient(":memory:")) as client:
        yield Place(client)


@pytest.fixture
def rest() -> Iterator[Place]:
    with qdrant_front() as front, closing(QdrantClient(url=front.url, check_compatibility=False)) as client:
        yield from closed(Place(client, {"url": front.url}, front))


@pytest.fixture
def rpc() -> Iterator[Place]:
    with (
        qdrant_front() as front,
        grpc_door(front) as port,
        closing(QdrantClient(url=front.url, prefer_grpc=True, grpc_port=port, check_compatibility=False)) as client,
    ):
        yield from closed(Place(client, {"url": front.url, "grpc": True, "grpc_port": port}, front))


def closed(place: Place) -> Iterator[Place]:
    with ExitStack() as stack:
        yield place
        for store in place.opened:
            stack.callback(store.close)


@pytest.fixture(params=["memory", "rest", "rpc"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


# -- settings -----------------------------------------------------------------------------------------------------


def test_these_are_all_settings_that_the_client_has() -> None:
    """A later client has more: then they belong into these tests."""
    assert SETTINGS.keys() == models.CreateCollection.model_fields.keys()
    assert LATE.keys() == models.CollectionParamsDiff.model_fields.keys() - models.CreateCollection.model_fields.keys()
    kinds = {getattr(index, "type", index) for index in INDEXES.values()}
    assert {kind.value for kind in kinds} == {kind.value for kind in models.PayloadSchemaType}


def test_everything_in_the_description_is_carried_over(place: Place) -> None:
    place.create()
    store = place.open()
    assert any("'other', 'tokens', 'words' stay as they are" in note for note in store.capabilities.notes)
    for _ in range(2):  # a call that was killed is repeated
        store.create_like("e", dim=8).close()
    old: Any = place.client.get_collection("d")
    new: Any = place.client.get_collection("e")
    assert old.config.metadata == SETTINGS["metadata"]
    if place.front is not None:
        assert old.config.params.read_fan_out_delay_ms == 15
        assert old.payload_schema.keys() == INDEXES.keys()
    image = old.config.params.vectors["image"]
    assert new.config.params.vectors["image"] == image.model_copy(update={"size": 8})
    new.config.params.vectors["image"] = image
    assert new.config == old.config
    assert new.payload_schema == old.payload_schema


@pytest.mark.parametrize("vectors", [SETTINGS["vectors"]["image"], {"image": SETTINGS["vectors"]["image"]}])
def test_a_single_vector_named_or_not(place: Place, vectors: Any) -> None:
    place.create(vectors=vectors, sparse_vectors=None, metadata=None, strict_mode_config=None)
    store = place.open(vector=None)
    store.create_like("e", dim=8).close()
    old: Any = place.client.get_collection("d").config
    new: Any = place.client.get_collection("e").config
    (new.params.vectors["image"] if isinstance(vectors, dict) else new.params.vectors).size = DIM
    assert new == old


def forgotten(path: str) -> Callable[[Any], Any]:
    def spoil(info: Any) -> Any:
        *parents, last = path.split(".")
        at: Any = info
        for name in parents:
            at = at.get(name, {}) if isinstance(at, dict) else getattr(at, name)
        if isinstance(at, dict):
            at.pop(last, None)  # an index is not there from the beginning
        else:
            setattr(at, last, None)
        return info

    return spoil


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("config.metadata", "metadata.made"),
        ("config.params.vectors.image.hnsw_config", "params.vectors.image.hnsw_config.m"),
        ("config.params.vectors.image.quantization_config", "params.vectors.image.quantization_config.binary"),
        ("config.params.vectors.other.datatype", "params.vectors.other.datatype"),
        ("config.params.vectors.tokens.multivector_config", "params.vectors.tokens.multivector_config"),
        ("config.params.sparse_vectors.words.modifier", "params.sparse_vectors.words.modifier"),
        ("config.params.read_fan_out_factor", "params.read_fan_out_factor"),
        ("config.params.id_tracker", "params.id_tracker.memory"),
        ("config.wal_config", "wal_config.wal_capacity_mb"),
        ("config.strict_mode_config.search_max_oversampling", "strict_mode_config.search_max_oversampling"),
        ("config.quantization_config", "quantization_config.scalar"),
        ("payload_schema.shop.params.is_tenant", "payload index shop.is_tenant"),
        ("payload_schema.name", "payload index name.data_type"),
    ],
)
def test_a_setting_that_the_server_forgets_is_named_and_nothing_is_left(rest: Place, path: str, says: str) -> None:
    rest.create()
    store = rest.open()
    assert rest.front is not None
    rest.front.fail("spoiled", path="GET /collections/e$", times=99, spoil=forgotten(path))
    with pytest.raises(StoreRejected) as refusal:
        store.create_like("e", dim=8)
    rest.front.heal()
    assert f"{says}" in str(refusal.value)
    assert str(refusal.value).endswith("differs: use rollout.strategy in_place")
    assert "\n" not in str(refusal.value)
    assert rest.names() == {"d"}
    store.create_like("e", dim=8).close()
    assert rest.names() == {"d", "e"}


def test_over_grpc_a_setting_that_is_forgotten_is_named_too(rpc: Place) -> None:
    rpc.create()
    store = rpc.open()
    assert rpc.front is not None
    rpc.front.fail("spoiled", path="GET /collections/e$", times=99, spoil=forgotten("config.metadata"))
    with pytest.raises(StoreRejected, match=r"metadata\.made\.at differs"):
        store.create_like("e", dim=8)
    assert rpc.names() == {"d"}


@pytest.mark.parametrize("at", ["params", "hnsw_config", ""])
def test_a_setting_of_a_later_server_is_refused_before_anything_is_made(rest: Place, at: str) -> None:
    rest.create()
    store = rest.open(write=False)

    def later(info: Any) -> Any:
        found = info.model_dump(mode="json")
        (found["config"][at] if at else found["config"])["vaults"] = 3
        return found

    assert rest.front is not None
    rest.front.fail("spoiled", path="GET /collections/d$", times=99, spoil=later)
    with pytest.raises(StoreRejected, match=r"the setting (\w+\.)*vaults, .*upgrade qdrant-client, or use .*in_place"):
        store.check_create_like(dim=8)
    assert not any(request.startswith("PUT /collections/e") for request in rest.front.requests)


@pytest.mark.parametrize("part", ["vectors", "index"])
def test_a_setting_of_a_later_server_that_the_client_cannot_read(rest: Place, part: str) -> None:
    rest.create()

    def later(info: Any) -> Any:
        found = info.model_dump(mode="json")
        if part == "vectors":
            found["config"]["params"]["vectors"]["image"]["vaults"] = 3
        else:
            found["payload_schema"]["shop"]["params"]["vaults"] = 3
        return found

    assert rest.front is not None
    rest.front.fail("spoiled", path="GET /collections/d$", times=99, spoil=later)
    with pytest.raises(StoreRejected, match=r"has the setting .*vaults, which .* does not know: upgrade qdrant-client"):
        rest.open()


def test_custom_shards_are_refused(rest: Place) -> None:
    rest.create(sharding_method=models.ShardingMethod.CUSTOM)
    with pytest.raises(StoreRejected, match=r"custom sharding.*in_place"):
        rest.open(write=False).check_create_like(dim=8)


def test_an_empty_collection_that_differs_is_made_again_and_a_full_one_is_kept(place: Place) -> None:
    place.create()
    store = place.open()
    vectors = {**SETTINGS["vectors"], "image": SETTINGS["vectors"]["image"].model_copy(update={"size": 8})}
    place.create("e", vectors=vectors, metadata={"owner": "nobody"})
    with closing(store.create_like("e", dim=8)) as shadow:
        assert place.client.get_collection("e").config.metadata == SETTINGS["metadata"]
        shadow.drop()
    place.create("e", vectors=vectors, metadata={"owner": "nobody"})
    place.client.upsert("e", [models.PointStruct(id=1, vector={"image": [0.5] * 8})])
    with pytest.raises(StoreRejected, match=r"e cannot be made like d: metadata\..* differs: remove it"):
        store.create_like("e", dim=8)
    assert place.client.count("e").count == 1


# -- vectors --------------------------------------------------------------------------------------------------------


def further_of(row: int) -> dict[str, Any]:
    """Of some points one or the other is missing."""
    found: dict[str, Any] = {
        "other": [0.25 * row, -1.5, 3.0],
        "tokens": [[0.6, 0.8]] * (row + 1),
        "words": models.SparseVector(indices=[4_000_000_000, 5 + row], values=[0.1, 1 / 3]),
    }
    if row < 4:
        found.pop(("other", "tokens", "words", "none")[row], None)
    return found


def fill(place: Place, name: str = "image") -> None:
    points = [
        models.PointStruct(id=item, vector={name: OLD[item].tolist(), **further_of(item)}, payload={"n": item})
        for item in IDS
    ]
    place.client.upsert("d", points)


def retrieved(client: QdrantClient, collection: str, without: str) -> list[tuple[Any, Any, dict[str, Any]]]:
    records = client.retrieve(collection, IDS, with_vectors=True)
    found = []
    for record in records:
        assert isinstance(record.vector, dict)
        vectors = {
            name: vector.model_dump() if isinstance(vector, models.SparseVector) else vector
            for name, vector in record.vector.items()
            if name != without
        }
        found.append((record.id, record.payload, vectors))
    return found


@pytest.mark.parametrize("name", ["image", ""])
def test_further_vectors_are_carried_over_as_they_are(place: Place, name: str) -> None:
    vectors = {**SETTINGS["vectors"]}
    place.create(vectors={name: vectors.pop("image"), **vectors})
    fill(place, name)
    store = place.open(vector=name)
    page = with_further(store, store.scan(after=None, limit=100))
    np.testing.assert_array_equal(page.vectors, OLD)
    assert page.further is not None
    assert set(page.further[0]) == {"tokens", "words"}
    assert isinstance(page.further[0]["words"], Sparse)
    assert np.shape(page.further[7]["tokens"]) == (8, 2)
    assert with_further(store, store.read([7, 99, 2])).further is not None
    with closing(store.create_like("e", dim=DIM)) as shadow:
        assert list(shadow.insert(Page(IDS, NEW, page.payloads, [None] * 8, page.further)).written) == IDS
        np.testing.assert_array_equal(shadow.read_vectors(IDS).vectors, NEW)
        assert with_further(shadow, shadow.read(IDS)).further is not None
    assert retrieved(place.client, "e", name) == retrieved(place.client, "d", name)
    # And in place nothing but the one vector is touched.
    before = retrieved(place.client, "d", name)
    assert list(store.write_vectors(IDS, NEW, "new", expected=page).written) == IDS
    np.testing.assert_array_equal(store.read_vectors(IDS).vectors, NEW)
    assert list(store.write_vectors(IDS, OLD, None).written) == IDS
    assert retrieved(place.client, "d", name) == before


def test_an_unnamed_vector_beside_a_sparse_one(place: Place) -> None:
    place.create(vectors=models.VectorParams(size=DIM, distance="Dot"), strict_mode_config=None)
    words = further_of(3)["words"]
    points = [models.PointStruct(id=item, vector={"": OLD[item].tolist(), "words": words}) for item in (1, 2)]
    points += [models.PointStruct(id=3, vector=OLD[3].tolist()), models.PointStruct(id=4, vector={"words": words})]
    place.client.upsert("d", points)
    store = place.open(vector=None)
    assert (store.count(), store.scan_ids(after=None, limit=9)) == (3, [1, 2, 3])
    assert list(store.read_stamps([1, 3, 4]).ids) == [1, 3]
    page = with_further(store, store.scan(after=None, limit=9))
    np.testing.assert_array_equal(page.vectors, OLD[1:4])
    assert [sorted(further) for further in page.further or ()] == [["words"], ["words"], []]
    with pytest.raises(StoreRejected, match=r"1 points without the vector ''.*in_place, or move these points"):
        store.check_create_like(dim=8)
    with pytest.raises(StoreRejected, match="without the vector"):
        store.create_like("e", dim=8)
    assert place.names() == {"d"}
    assert list(store.write_vectors([1, 3, 4], NEW[:3], "new").deleted) == [4]
    place.client.delete("d", [4])  # the advice
    store.check_create_like(dim=8)
    with closing(store.create_like("e", dim=DIM)) as shadow:
        shadow.insert(Page(page.ids, page.vectors, page.payloads, page.stamps, page.further))
    (one, three) = place.client.retrieve("e", [1, 3], with_vectors=True)
    assert one.vector == place.client.retrieve("d", [1], with_vectors=True)[0].vector | {"": OLD[1].tolist()}  # type: ignore[operator]
    assert three.vector == OLD[3].tolist()


def test_a_page_without_further_vectors_is_refused(place: Place) -> None:
    place.create()
    store = place.open()
    with pytest.raises(StoreRejected, match="further vectors, which are not given"):
        store.insert(Page(IDS, OLD, [{}] * 8, [None] * 8))
    assert store.count() == 0


def test_nan_in_a_payload_is_refused_where_it_would_be_lost(place: Place) -> None:
    """The client sends null over REST, and a text over gRPC."""
    place.create(vectors=models.VectorParams(size=DIM, distance="Dot"), sparse_vectors=None, strict_mode_config=None)
    store = place.open(vector=None)
    payloads: list[dict[str, Any]] = [{"a": 1.0}, {"a": float("nan")}, {"a": [{"b": float("inf")}]}, {"a": "NaN"}]
    report = store.insert(Page(IDS[:4], OLD[:4], payloads, [None] * 4))
    if place.front is None:
        assert list(report.written) == IDS[:4]
        assert repr(place.client.retrieve("d", [1])[0].payload) == "{'a': nan}"
        page = store.read(IDS[:4])
        assert list(store.write_vectors(IDS[:4], NEW[:4], "new", expected=page).written) == IDS[:4]
        assert list(store.write_vectors(IDS[:4], NEW[:4], "new", expected=page).changed) == []
    else:
        assert (list(report.written), set(report.rejected)) == ([0, 3], {1, 2})
        assert "NaN or infinity" in report.rejected[1]
        assert [record.payload for record in place.client.retrieve("d", IDS)] == [{"a": 1.0}, {"a": "NaN"}]


def test_large_further_vectors_go_in_several_requests(rest: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrator.adapters.qdrant.points.REQUEST_BYTES", 3_000)
    rest.create(strict_mode_config=None)
    store = rest.open()
    further: list[dict[str, Any]] = [{"tokens": np.tile(np.array([0.6, 0.8], np.float32), (60, 1))} for _ in IDS]
    assert rest.front is not None
    assert list(store.insert(Page(IDS, OLD, [{}] * 8, [None] * 8, further)).written) == IDS
    assert rest.front.requests.count("PUT /collections/d/points") == 4
    (stored,) = rest.client.retrieve("d", [7], with_vectors=True)
    assert isinstance(stored.vector, dict)
    assert len(cast(list[Any], stored.vector["tokens"])) == 60


def test_a_server_that_gives_less_than_it_has(rest: Place) -> None:
    """A replica that lags must not pass for points without further vectors."""
    from migrator.adapters.base import StoreUnavailable

    rest.create(strict_mode_config=None)
    fill(rest)
    store = rest.open()
    assert rest.front is not None
    rest.front.fail("spoiled", path="POST /collections/d/points$", spoil=lambda records: records[1:])
    with pytest.raises(StoreUnavailable, match="1 of the requested points fewer"):
        store.read_further(IDS)


# -- an edge folder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    import qdrant_edge as e

    folder = tmp_path / "edge"
    (folder / "d").mkdir(parents=True)
    tokens = e.MultiVectorConfig(e.MultiVectorComparator.MaxSim)
    config = e.EdgeConfig(
        vectors={
            "image": e.EdgeVectorParams(DIM, e.Distance.Dot, on_disk=True),
            "other": e.EdgeVectorParams(3, e.Distance.Dot),
            "tokens": e.EdgeVectorParams(2, e.Distance.Cosine, multivector_config=tokens),
        },
        sparse_vectors={"words": e.EdgeSparseVectorParams(on_disk=True, full_scan_threshold=77)},
        on_disk_payload=False,
    )
    shard = e.EdgeShard.create(str(folder / "d"), config)
    shard.update(e.UpdateOperation.create_field_index("shop", e.KeywordIndexParams(is_tenant=True)))
    text = e.TextIndexParams(tokenizer=e.TokenizerType.Prefix, min_token_len=2)
    shard.update(e.UpdateOperation.create_field_index("name", text))
    points = []
    for item in IDS:
        more = further_of(item)
        if "words" in more:
            more["words"] = e.SparseVector(more["words"].indices, more["words"].values)
        points.append(e.Point(item, {"image": OLD[item].tolist(), **more}, {"n": {"at": [item]}}))
    shard.update(e.UpdateOperation.upsert_points(points))
    shard.close()
    return folder


def on_the_edge(folder: Path) -> Store:
    settings = {"kind": "qdrant", "engine": "edge", "path": str(folder), "collection": "d", "vector": "image"}
    return open_store(settings, write=True)


def held(folder: Path) -> list[tuple[Any, str, dict[str, str]]]:
    """What the engine itself gives, without the vector that is migrated."""
    import qdrant_edge as e

    with closing(e.EdgeShard.load(str(folder))) as shard:
        records, _ = shard.scroll(e.ScrollRequest(limit=99, with_payload=True, with_vector=True))
        return [
            (record.id, str(record.payload), {k: str(v) for k, v in sorted(record.vector.items()) if k != "image"})
            for record in cast(list[Any], records)
        ]


def test_further_vectors_and_settings_on_the_edge(edge: Path) -> None:
    with closing(on_the_edge(edge)) as store:
        page = with_further(store, store.scan(after=None, limit=100))
        with pytest.raises(StoreRejected, match="further vectors, which are not given"):
            store.insert(Page(IDS, OLD, [{}] * 8, [None] * 8))
        for _ in range(2):
            with closing(store.create_like("e", dim=DIM)) as shadow:
                assert list(shadow.insert(Page(IDS, NEW, page.payloads, [None] * 8, page.further)).written) == IDS
                np.testing.assert_array_equal(shadow.read_vectors(IDS).vectors, NEW)
        with closing(store.create_like("f", dim=8)) as shadow:
            assert shadow.describe().dim == 8
    assert held(edge / "e") == held(edge / "d")
    assert len(held(edge / "e")) == 8


def test_a_setting_that_the_engine_forgets_on_the_edge(edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from migrator.adapters.qdrant.shard import Folder

    create = Folder.create
    with closing(on_the_edge(edge)) as store:
        for settings, indexes, says in (
            ({"on_disk_payload": None}, {}, "on_disk_payload"),
            ({"sparse_vectors": {}}, {}, r"sparse_vectors\.words"),
            ({}, {"shop": None}, "payload index shop"),
        ):

            def forget(
                self: Folder, collection_id: str, config: Any, found: Any, drop: Any = (settings, indexes)
            ) -> None:
                config = {k: v for k, v in {**config, **drop[0]}.items() if v is not None}
                create(self, collection_id, config, {k: v for k, v in found.items() if k not in drop[1]})

            with monkeypatch.context() as patch:
                patch.setattr(Folder, "create", forget)
                with pytest.raises(StoreRejected, match=rf"e cannot be made like d: {says}.* differs: use .*in_place"):
                    store.create_like("e", dim=8)
            assert not store.exists("e")


def test_points_without_the_vector_on_the_edge(edge: Path) -> None:
    import qdrant_edge as e

    with closing(e.EdgeShard.load(str(edge / "d"))) as shard:
        shard.update(e.UpdateOperation.upsert_points([e.Point(99, {"other": [1.0, 2.0, 3.0]}, {})]))
    with closing(on_the_edge(edge)) as store:
        with pytest.raises(StoreRejected, match=r"1 points without the vector 'image'.*in_place"):
            store.check_create_like(dim=8)
        with pytest.raises(StoreRejected, match="without the vector"):
            store.create_like("e", dim=8)
        assert not store.exists("e")
