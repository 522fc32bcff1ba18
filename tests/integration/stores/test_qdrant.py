"""The Qdrant adapter under the contract of all stores: in memory, over REST, and on a real server if there is one."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models

from migrator.adapters.base import ItemId, Store, StoreBusy, StoreRejected, StoreUnavailable, Vectors
from migrator.adapters.qdrant.connection import Connection
from migrator.adapters.qdrant.points import STAMP
from migrator.adapters.qdrant.store import QdrantStore
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, Collection, Make, StoreContract, payloads_of, unit_vectors

UUIDS = st.uuids().map(str)


@dataclass
class Points(Collection):
    """A collection that the application reaches with a client of its own."""

    client: QdrantClient
    name: str
    vector: str
    settings: dict[str, Any] | None = None
    """How the adapter gets at it; None where it must share the client, for a Qdrant in memory."""
    aliases: list[str] = field(default_factory=list)

    def open(self, *, write: bool = True) -> Store:
        name = self.aliases[0] if self.aliases else self.name
        if self.settings is not None:
            return open_store({"kind": "qdrant", "collection": name, **self.settings}, write=write)
        connection = Connection(self.client, "memory", local=True, keep=True)
        return QdrantStore(connection, name, vector=self.vector or None, write=write)

    def add_alias(self) -> str:
        self.aliases.append(f"{self.name}_alias")
        self.client.update_collection_aliases(
            [
                models.CreateAliasOperation(
                    create_alias=models.CreateAlias(collection_name=self.name, alias_name=self.aliases[0])
                )
            ]
        )
        return self.aliases[0]

    def alias_leads_to(self) -> str:
        found = {alias.alias_name: alias.collection_name for alias in self.client.get_aliases().aliases}
        return found[self.aliases[0]]

    def all_names(self) -> set[str]:
        return {found.name for found in self.client.get_collections().collections}

    def create(self, distance: models.Distance) -> None:
        params = models.VectorParams(size=DIM, distance=distance)
        self.client.create_collection(self.name, {self.vector: params} if self.vector else params)

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None:
        points = [
            models.PointStruct(id=item, vector=self._named(vector), payload=payload)
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        if points:
            self.client.upsert(self.name, points)

    def _named(self, vector: np.ndarray) -> Any:
        return {self.vector: vector.tolist()} if self.vector else vector.tolist()

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        records = {record.id: record for record in self.client.retrieve(self.name, list(ids))}
        payloads = [{k: v for k, v in (records[item].payload or {}).items() if k != STAMP} for item in ids]
        self.insert(ids, vectors, payloads)

    def delete(self, ids: Sequence[ItemId]) -> None:
        self.client.delete(self.name, list(ids))

    def visible(self) -> dict[ItemId, np.ndarray]:
        records, _ = self.client.scroll(self.name, limit=10_000, with_vectors=True)
        return {
            record.id: np.array(record.vector[self.vector] if self.vector else record.vector, np.float32)
            for record in cast(list[Any], records)
        }


class QdrantContract(StoreContract):
    """Integers are unsigned in Qdrant."""

    id_strategy: st.SearchStrategy[ItemId] = st.integers(0, 2**63 - 1)
    arriving = (3, 1001)
    missing = "ffffffff-ffff-4fff-8fff-ffffffffffff"
    arriving_strings = ("00000000-0000-4000-8000-000000000000", "ffffffff-ffff-4fff-8fff-fffffffffffe")

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        return [int(item) for item in np.random.default_rng(7).permutation(np.arange(4, 404, 2))]


NUMBER = itertools.count()


def made_with(client: QdrantClient, distance: models.Distance, vector: str, settings: dict[str, Any] | None) -> Make:
    def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Points:
        points = Points(client, f"test_{uuid.uuid4().hex[:12]}", vector, settings)
        points.create(distance)
        points.insert(ids, vectors, payloads)
        return points

    return make


class InMemory(QdrantContract):
    def test_a_second_writer(self, make: Make) -> None:  # type: ignore[override]
        pytest.skip("all stores in memory share one client; a folder's second writer has its own test below")


@pytest.mark.parametrize(
    ("distance", "vector"),
    [(models.Distance.COSINE, ""), (models.Distance.DOT, "image"), (models.Distance.EUCLID, "")],
    ids=["cosine", "dot-named", "euclid"],
)
class TestInMemory(InMemory):
    @pytest.fixture
    def make(self, distance: models.Distance, vector: str) -> Iterator[Make]:
        with closing(QdrantClient(":memory:")) as client:
            yield made_with(client, distance, vector, None)


class TestUuidsInMemory(InMemory):
    id_strategy = UUIDS

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        rng = np.random.default_rng(3)
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(200)]

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        with closing(QdrantClient(":memory:")) as client:
            yield made_with(client, models.Distance.COSINE, "", None)


class Remote(Points):
    """As if the client spoke to a server: other processes may write at any moment."""

    def open(self, *, write: bool = True) -> QdrantStore:
        connection = Connection(self.client, "remote", local=False, keep=True)
        return QdrantStore(connection, self.aliases[0] if self.aliases else self.name, vector=None, write=write)


@pytest.fixture
def remote() -> Iterator[Make]:
    with closing(QdrantClient(":memory:")) as client:

        def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Remote:
            points = Remote(client, f"test_{uuid.uuid4().hex[:12]}", "")
            points.create(models.Distance.DOT)
            points.insert(ids, vectors, payloads)
            return points

        yield make


# What local mode says of settings that only a server has.
LOCAL_MODE = ("ignore:Payload indexes have no effect:UserWarning", "ignore:Local mode performs exact:UserWarning")


@pytest.mark.filterwarnings(*LOCAL_MODE)
class TestWithClaims(QdrantContract):
    """The way of writing that a server needs, with write intents and conditions, which local mode understands too."""

    @pytest.fixture
    def make(self, remote: Make) -> Make:
        return remote

    def test_one_thread_reads_while_another_writes(self, make: Make) -> None:  # type: ignore[override]
        pytest.skip("the client in memory is not made for two threads")


@pytest.mark.filterwarnings(*LOCAL_MODE)
@pytest.mark.parametrize("moment", range(1, 12))
@pytest.mark.parametrize("what", ["upsert", "delete", "payload"])
def test_an_application_writes_between_two_requests(
    remote: Make, monkeypatch: pytest.MonkeyPatch, moment: int, what: str
) -> None:
    """Whatever it does, and whenever: its write stays, and a stamp stands only beside a vector of ours."""
    ids: list[ItemId] = [1, 2, 3]
    old, new, theirs = unit_vectors(3), unit_vectors(3, seed=1), unit_vectors(1, seed=2)
    points = remote(ids, old, payloads_of(ids))
    assert isinstance(points, Remote)
    store = points.open()
    page = store.read(ids)
    requests = itertools.count(1)
    ask = store._connection.ask

    def interposed(call: Any) -> Any:
        if next(requests) == moment:
            if what == "upsert":
                points.insert([2], theirs, [{"path": "theirs.png", "price": 0.0}])
            elif what == "delete":
                points.delete([2])
            else:
                points.client.set_payload(points.name, {"price": -7.0}, points=[2])
        return ask(call)

    monkeypatch.setattr(store._connection, "ask", interposed)
    report = store.write_vectors(ids, new, "new", expected=page)
    happened = next(requests) > moment
    assert sorted([*report.written, *report.deleted, *report.changed], key=str) == ids
    assert {1, 3} <= set(report.written)
    monkeypatch.undo()
    found = store.read([2])
    if not happened:
        assert list(found.stamps) == ["new"]
    elif what == "delete":
        assert len(found) == 0
    elif what == "upsert":
        np.testing.assert_array_equal(found.vectors, theirs)
        assert found.payloads == [{"path": "theirs.png", "price": 0.0}]
        assert list(found.stamps) != ["new"]
    else:
        assert found.payloads[0]["price"] == -7.0
        if list(found.stamps) == ["new"]:
            np.testing.assert_array_equal(found.vectors, new[1:2])
    store.close()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
@pytest.mark.skipif("QDRANT_URL" not in os.environ, reason="QDRANT_URL is not set: no Qdrant server to test with")
class TestOnAServer(QdrantContract):
    """The same against the server at QDRANT_URL (and QDRANT_API_KEY)."""

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        url = os.environ["QDRANT_URL"]
        key = os.environ.get("QDRANT_API_KEY")
        settings = {"url": url, **({"api_key": key} if key else {})}
        with closing(QdrantClient(url=url, api_key=key, check_compatibility=False)) as client:
            before = {found.name for found in client.get_collections().collections}
            yield made_with(client, models.Distance.COSINE, "", settings)
            for found in client.get_collections().collections:
                if found.name not in before and found.name.startswith("test_"):
                    client.delete_collection(found.name)


# -- a local folder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(QdrantClient(path=str(tmp_path / "qdrant"))) as client:
        points = Points(client, "products", "")
        points.create(models.Distance.COSINE)
        ids = list(range(20))
        points.insert(ids, unit_vectors(20), payloads_of(ids))
    return tmp_path / "qdrant"


def test_a_folder_keeps_what_was_written(folder: Path) -> None:
    settings = {"kind": "qdrant", "path": str(folder), "collection": "products"}
    new = unit_vectors(5, seed=1)
    with closing(open_store(settings, write=True)) as store:
        assert store.write_vectors([1, 2, 3, 4, 99], new, "s").deleted == [99]
        assert not store.capabilities.concurrent_writers
        with pytest.raises(StoreBusy, match="another process"):
            open_store(settings, write=False)
        with closing(store.create_like("products__x", dim=8)) as shadow:
            assert shadow.count() == 0
    with closing(open_store(settings, write=False)) as store:
        assert store.count(stamp="s") == 4
        page = store.read([1, 2, 3, 4])
        np.testing.assert_allclose(page.vectors, new[:4], atol=1e-6)
        assert list(page.payloads) == payloads_of(range(20))[1:5]
        assert store.exists("products__x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"collection": "produkts"}, "no collection or alias 'produkts'"),
        ({"path": "nowhere"}, "holds no local Qdrant"),
        ({"vector": "image"}, "no vector 'image'"),
        ({"url": "http://127.0.0.1:1"}, "either `url`"),
        ({"colection": "x"}, "no setting 'colection'"),
    ],
)
def test_what_cannot_be_opened(folder: Path, change: dict[str, Any], says: str) -> None:
    settings = {"kind": "qdrant", "path": str(folder), "collection": "products", **change}
    with pytest.raises(StoreRejected, match=says) as refusal:
        open_store(settings, write=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (
            {"a": models.VectorParams(size=4, distance="Cosine"), "b": models.VectorParams(size=4, distance="Dot")},
            "'a', 'b'",
        ),
        ({}, "no dense vectors"),
        (models.VectorParams(size=4, distance="Manhattan"), "Manhattan"),
        (
            models.VectorParams(
                size=4,
                distance="Cosine",
                multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            ),
            "multi-vectors",
        ),
    ],
)
def test_vectors_that_cannot_be_migrated(tmp_path: Path, vectors: Any, says: str) -> None:
    with closing(QdrantClient(path=str(tmp_path))) as client:
        client.create_collection("c", vectors, sparse_vectors_config={"words": models.SparseVectorParams()})
    with pytest.raises(StoreRejected, match=says):
        open_store({"kind": "qdrant", "path": str(tmp_path), "collection": "c"}, write=False)


def test_a_shadow_would_lose_further_vectors(tmp_path: Path) -> None:
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    with closing(QdrantClient(path=str(tmp_path))) as client:
        client.create_collection("c", {"image": params, "text": params})
        both = [{"image": v.tolist(), "text": v[::-1].tolist()} for v in unit_vectors(4)]
        client.upsert("c", [models.PointStruct(id=n, vector=v) for n, v in enumerate(both[:3])])
        client.upsert("c", [models.PointStruct(id=3, vector={"text": both[3]["text"]})])
    settings = {"kind": "qdrant", "path": str(tmp_path), "collection": "c", "vector": "image"}
    with closing(open_store(settings, write=True)) as store:
        # A point without the vector is no item.
        assert (store.count(), store.scan_ids(after=None, limit=9)) == (3, [0, 1, 2])
        assert list(store.read_stamps([2, 3]).ids) == [2]
        with pytest.raises(StoreRejected, match="in_place"):
            store.create_like("d", dim=DIM)
        new = unit_vectors(3, seed=1)
        assert store.write_vectors([0, 3], new[:2], "s").deleted == [3]
    with closing(QdrantClient(path=str(tmp_path))) as client:
        (record,) = client.retrieve("c", [0], with_vectors=True)
        stored: Any = record.vector
        np.testing.assert_allclose(stored["text"], both[0]["text"], atol=1e-6)
        np.testing.assert_allclose(stored["image"], new[0], atol=1e-6)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(StoreUnavailable) as refusal:
        open_store({"kind": "qdrant", "url": "http://127.0.0.1:1", "collection": "c", "timeout": 2}, write=False)
    assert "\n" not in str(refusal.value)
