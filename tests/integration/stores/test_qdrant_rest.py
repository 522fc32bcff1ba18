"""The Qdrant adapter over REST: the contract of all stores, and every fault that a server or a network can have."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from migrator.adapters.base import ItemId, Page, Store, StoreRejected, StoreUnavailable, Vectors
from migrator.adapters.qdrant.store import QdrantStore
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, Make, payloads_of, unit_vectors
from migrator.retry import with_retries
from tests.integration.stores.test_qdrant import UUIDS, Points, QdrantContract, made_with
from tests.qdrant_front import Front, Refusal, qdrant_front, qdrant_process


@pytest.fixture(scope="module")
def server() -> Iterator[Front]:
    """One for all the tests that break nothing."""
    with qdrant_front() as front:
        yield front


@pytest.fixture(scope="module")
def application(server: Front) -> Iterator[QdrantClient]:
    with closing(QdrantClient(url=server.url, check_compatibility=False)) as client:
        yield client


class TestOverRest(QdrantContract):
    @pytest.fixture
    def make(self, server: Front, application: QdrantClient) -> Make:
        return made_with(application, models.Distance.COSINE, "", {"url": server.url})


class TestUuidsAndANamedVectorOverRest(QdrantContract):
    id_strategy = UUIDS

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        rng = np.random.default_rng(3)
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(200)]

    @pytest.fixture
    def make(self, server: Front, application: QdrantClient) -> Make:
        return made_with(application, models.Distance.DOT, "image", {"url": server.url})


@dataclass
class Strict(Points):
    """With the limits that Qdrant's managed service sets, only tighter."""

    def create(self, distance: models.Distance) -> None:
        limits = {
            "max_query_limit": 60,
            "upsert_max_batchsize": 50,
            "condition_max_size": 40,
            "search_max_batchsize": 3,
        }
        self.client.create_collection(
            self.name,
            models.VectorParams(size=DIM, distance=distance),
            strict_mode_config=models.StrictModeConfig(
                enabled=True, unindexed_filtering_retrieve=False, unindexed_filtering_update=False, **limits
            ),
        )

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None:
        for start in range(0, len(ids), 50):
            part = slice(start, start + 50)
            super().insert(ids[part], vectors[part], payloads[part])

    def visible(self) -> dict[ItemId, np.ndarray]:
        found: dict[ItemId, np.ndarray] = {}
        following: Any = None
        while following is not None or not found:
            records, following = self.client.scroll(self.name, limit=60, offset=following, with_vectors=True)
            found.update({record.id: np.array(record.vector, np.float32) for record in cast(list[Any], records)})
        return found


class TestStrictMode(QdrantContract):
    @pytest.fixture
    def make(self, server: Front, application: QdrantClient) -> Make:
        def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Strict:
            points = Strict(application, f"test_{uuid.uuid4().hex[:12]}", "", {"url": server.url})
            points.create(models.Distance.DOT)
            points.insert(ids, vectors, payloads)
            return points

        return make


@pytest.fixture(scope="module")
def old_server() -> Iterator[Front]:
    with qdrant_front(version="1.10.1") as front:
        yield front


class TestAnOldServer(QdrantContract):
    """Without conditional updates."""

    @pytest.fixture
    def make(self, old_server: Front) -> Iterator[Make]:
        with closing(QdrantClient(url=old_server.url, check_compatibility=False)) as client:
            yield made_with(client, models.Distance.EUCLID, "", {"url": old_server.url})


# -- faults -----------------------------------------------------------------------------------------------------------

IDS: list[ItemId] = list(range(20))
OLD, NEW, THEIRS = unit_vectors(20), unit_vectors(20, seed=1), unit_vectors(20, seed=2)


class Place:
    """A front with the collection "c" and the alias "a"; the application reaches it without going over the network."""

    def __init__(self, front: Front, **settings: Any) -> None:
        self.front, self.client = front, front.qdrant.client
        self.settings: dict[str, Any] = {"kind": "qdrant", "url": front.url, "collection": "c", **settings}
        self.struck = True
        self.fresh()
        self.store = self.open()

    def fresh(self) -> None:
        """The collection as it was at first, and nothing else."""
        for found in self.client.get_collections().collections:
            self.front.qdrant.delete_collection(found.name)
        points = Points(self.client, "c", "")
        points.create(models.Distance.DOT)
        points.insert(IDS, OLD, payloads_of(IDS))
        self.client.update_collection_aliases(
            [models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name="c", alias_name="a"))]
        )

    def open(self, **settings: Any) -> Store:
        return open_store({**self.settings, **settings}, write=True)

    def upsert(self, item: int) -> None:
        points = [models.PointStruct(id=item, vector=THEIRS[item].tolist(), payload={"path": "theirs.png"})]
        self.client.upsert("c", points)

    def vectors(self) -> dict[ItemId, list[float]]:
        records, _ = self.client.scroll("c", limit=1000, with_vectors=True)
        return {record.id: record.vector for record in cast(list[Any], records)}

    def moments(self) -> Iterator[int]:
        """0, 1, 2, ... with the collection as at first, until a fault at that moment comes too late to strike."""
        assert isinstance(self.store, QdrantStore)
        for moment in itertools.count():
            self.fresh()
            self.store._indexed = False
            yield moment
            if not self.struck:
                assert moment > 0
                return

    @contextlib.contextmanager
    def fault(self, what: Any, **how: Any) -> Iterator[None]:
        """One fault, for as long as this lasts."""
        self.front.fail(what, **how)
        yield
        self.struck = not self.front.pending
        self.front.heal()


def place_at(version: str) -> Iterator[Place]:
    with qdrant_front(version=version) as front:
        place = Place(front)
        with closing(place.store):
            yield place


@pytest.fixture
def place() -> Iterator[Place]:
    yield from place_at("1.16.0")


@pytest.fixture(params=["1.16.0", "1.10.1"])
def any_place(request: pytest.FixtureRequest) -> Iterator[Place]:
    yield from place_at(request.param)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again without waiting."""
    monkeypatch.setattr("migrator.retry._backoff", lambda state: 0.0)


def one_line(error: BaseException) -> str:
    says = str(error)
    assert "\n" not in says
    assert len(says) < 400
    return says


@pytest.mark.parametrize(
    ("what", "how", "kind", "advice", "says"),
    [
        ("status", {"status": 429, "retry_after": "7"}, StoreUnavailable, 7, "overloaded"),
        ("status", {"status": 429, "retry_after": "soon"}, StoreUnavailable, None, "Retry-After"),
        ("status", {"status": 429}, StoreUnavailable, None, "status 429: a fault of the kind 429"),
        ("status", {"status": 503, "retry_after": "3"}, StoreUnavailable, 3, "status 503"),
        ("status", {"status": 500}, StoreUnavailable, None, "status 500"),
        ("status", {"status": 408}, StoreUnavailable, None, "status 408"),
        ("status", {"status": 400}, StoreRejected, None, "refused with status 400: a fault of the kind 400"),
        ("status", {"status": 404}, StoreRejected, None, "refused with status 404"),
        ("status", {"status": 401}, StoreRejected, None, "correct `api_key`"),
        ("drop", {}, StoreUnavailable, None, "did not answer"),
        ("drop_after", {}, StoreUnavailable, None, "did not answer"),
        ("slow", {}, StoreUnavailable, None, "did not answer: timed out"),
        ("garbage", {}, StoreUnavailable, None, "not JSON"),
        ("spoiled", {"spoil": lambda result: None}, StoreUnavailable, None, "nothing"),
        ("spoiled", {"spoil": lambda result: {"points": 7}}, StoreUnavailable, None, "is it a Qdrant?"),
    ],
)
def test_a_fault_in_the_words_of_this_package(
    place: Place, what: Any, how: dict[str, Any], kind: type[Exception], advice: float | None, says: str
) -> None:
    with closing(place.open(timeout=1)) as store:
        before = len(place.front.requests)
        place.front.fail(what, **how)
        with pytest.raises(kind, match=says) as fault:
            store.scan(after=None, limit=5)
        assert len(place.front.requests) == before + 1, "retries are the caller's business"
        assert getattr(fault.value, "retry_after", None) == advice
        one_line(fault.value)
        place.front.heal()
        assert list(store.scan(after=None, limit=5).ids) == IDS[:5]


FAULTS: list[tuple[Any, dict[str, Any]]] = [
    ("status", {"status": 503}),
    ("drop", {}),
    ("drop_after", {}),
    ("half", {}),
    ("torn", {}),
    ("acknowledged", {}),
    ("garbage", {}),
]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("what", "how"), FAULTS, ids=[what for what, _ in FAULTS])
@pytest.mark.parametrize("stamp", ["new", None])
def test_a_write_that_went_wrong_is_repaired_by_repeating_it(
    any_place: Place, what: Any, how: dict[str, Any], stamp: str | None
) -> None:
    """Whichever of its requests it was; what the application did before it is respected as without the fault."""
    place = any_place
    for moment in place.moments():
        store = place.store
        page = store.read(IDS)
        place.client.delete("c", [3])
        place.upsert(5)
        with place.fault(what, skip=moment, **how):
            report = with_retries(lambda: store.write_vectors(IDS, NEW, stamp, expected=page), seconds=20)  # noqa: B023
        ours = [item for item in IDS if item not in (3, 5)]
        assert (list(report.written), list(report.deleted), list(report.changed)) == (ours, [3], [5]), moment
        assert dict(report.rejected) == {}
        found = store.read(IDS)
        assert list(found.ids) == [item for item in IDS if item != 3]
        for item, vector, payload, its in zip(
            cast(Sequence[int], found.ids), found.vectors, found.payloads, found.stamps, strict=True
        ):
            theirs = item == 5
            np.testing.assert_array_equal(vector, (THEIRS if theirs else NEW)[item])
            assert payload == ({"path": "theirs.png"} if theirs else payloads_of(IDS)[item])
            assert its == (None if theirs else stamp)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("what", ["status", "drop", "drop_after", "half", "acknowledged"])
@pytest.mark.parametrize("deed", ["insert", "delete", "alias", "create", "forget"])
def test_a_deed_that_went_wrong_is_repaired_by_repeating_it(place: Place, what: Any, deed: str) -> None:
    for moment in place.moments():
        Points(place.client, "other", "").create(models.Distance.DOT)
        store = place.store
        store.write_vectors(IDS[:5], NEW[:5], "new")
        page = store.read(IDS)

        def act(store: Store = store, page: Page = page) -> Any:
            if deed == "insert":
                stamps = ["new"] * len(page)
                return store.insert(Page(page.ids, NEW, page.payloads, stamps)).written
            if deed == "delete":
                return store.delete([*IDS[:10], 99])
            if deed == "alias":
                return store.swap_alias("a", to="other")
            if deed == "create":
                return store.create_like("like", dim=8).close()
            return store.clear_migration_state()

        with place.fault(what, skip=moment):
            result = with_retries(act, seconds=20)
        now = store.read_vectors(IDS)
        if deed == "insert":
            assert (list(result), set(now.stamps)) == (IDS, {"new"})
            np.testing.assert_array_equal(now.vectors, NEW)
        elif deed == "delete":
            assert list(now.ids) == IDS[10:]
        elif deed == "alias":
            assert [found.collection_name for found in place.client.get_aliases().aliases] == ["other"]
        elif deed == "create":
            vectors = place.client.get_collection("like").config.params.vectors
            assert isinstance(vectors, models.VectorParams)
            assert vectors.size == 8
        else:
            assert set(now.stamps) == {None}


def test_a_write_that_is_not_repeated_leaves_no_stamp_that_lies(any_place: Place) -> None:
    """The process gives up, or is killed, after any of its requests, whole or half done."""
    place = any_place
    for what in ("drop", "drop_after", "half", "torn"):
        for moment in place.moments():
            store = place.store
            page = store.read(IDS)
            with place.fault(what, skip=moment), contextlib.suppress(StoreUnavailable):
                store.write_vectors(IDS, NEW, "new", expected=page)
            found = store.read(IDS)
            for item, vector, stamp in zip(cast(Sequence[int], found.ids), found.vectors, found.stamps, strict=True):
                if stamp == "new":
                    np.testing.assert_array_equal(vector, NEW[item])
                elif stamp is None:  # or a write intent: then it may be either
                    np.testing.assert_array_equal(vector, OLD[item])
            assert found.payloads == payloads_of(IDS)
            assert store.count(stamp="new") == list(found.stamps).count("new")


def test_a_server_that_stays_away_is_waited_for_until_the_deadline(place: Place) -> None:
    store = place.store
    before = len(place.front.requests)
    place.front.fail("status", status=503, times=10**6)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        with_retries(lambda: store.scan(after=None, limit=5), seconds=0.8)
    assert time.monotonic() - began < 2
    assert 2 <= len(place.front.requests) - before <= 5


def test_the_servers_advice_is_heard(place: Place) -> None:
    store = place.store
    place.front.fail("status", status=429, retry_after="1")
    began = time.monotonic()
    assert len(with_retries(lambda: store.scan(after=None, limit=5), seconds=10)) == 5
    assert time.monotonic() - began >= 1
    # Advice that goes beyond the deadline is not waited for.
    before = len(place.front.requests)
    place.front.fail("status", status=429, retry_after="60", times=10**6)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        with_retries(lambda: store.scan(after=None, limit=5), seconds=5)
    assert time.monotonic() - began < 1
    assert len(place.front.requests) == before + 1


@pytest.mark.parametrize("deed", ["write", "insert"])
def test_a_point_that_is_refused_does_not_stop_the_others(place: Place, deed: str) -> None:
    def refuse(request: str, body: bytes) -> None:
        if request.endswith("/points/batch"):
            points = json.loads(body)["operations"][0]["update_vectors"]["points"]
        elif request == "PUT /collections/c/points":
            points = json.loads(body)["points"]
        else:
            return
        if any(point["id"] in (7, 12) for point in points):
            raise Refusal(400, "Wrong input: there is something about this point")

    store = place.store
    assert isinstance(store, QdrantStore)
    page = store.read(IDS)
    store._index_stamps()
    place.front.before = refuse
    if deed == "write":
        report = store.write_vectors(IDS, NEW, "new", expected=page)
    else:
        report = store.insert(Page(page.ids, NEW, page.payloads, ["new"] * 20))
    place.front.before = None
    assert set(report.rejected) == {7, 12}
    assert all("something about this point" in one_line(Exception(why)) for why in report.rejected.values())
    assert list(report.written) == [item for item in IDS if item not in (7, 12)]
    now = store.read([6, 7, 12])
    np.testing.assert_array_equal(now.vectors, [NEW[6], OLD[7], OLD[12]])
    assert list(now.stamps) == ["new", None, None]


def test_a_point_that_a_server_misses_and_has_does_not_hold_us_for_ever(place: Place) -> None:
    def refuse(request: str, body: bytes) -> None:
        if request == "POST /collections/c/points/batch":
            raise Refusal(404, "Not found: No point with id 3 found")

    store = place.store
    place.front.before = refuse
    with pytest.raises(StoreUnavailable, match="misses points that it has") as fault:
        store.write_vectors(IDS, NEW, "new")
    one_line(fault.value)


# -- another writer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["upsert", "delete", "payload"])
def test_an_application_writes_between_two_requests(place: Place, what: str) -> None:
    """As test_qdrant has it for local mode: the application's write stays, a stamp stands only beside our vector."""
    for moment in itertools.count(1):
        place.fresh()
        requests = itertools.count(1)
        happened: list[str] = []

        def interpose(request: str, body: bytes, moment: int = moment, requests: Any = requests) -> None:
            if next(requests) == moment:
                happened.append(request)  # noqa: B023
                if what == "upsert":
                    points = [models.PointStruct(id=2, vector=THEIRS[2].tolist(), payload={"path": "theirs.png"})]
                    place.client.upsert("c", points)
                elif what == "delete":
                    place.client.delete("c", [2])
                else:
                    place.client.set_payload("c", {"price": -7.0}, points=[2])

        store = place.store
        page = store.read(IDS)
        place.front.before = interpose
        report = store.write_vectors(IDS, NEW, "new", expected=page)
        place.front.before = None
        assert sorted([*report.written, *report.deleted, *report.changed]) == IDS
        assert set(IDS) - {2} <= set(report.written)
        found = store.read([2])
        if not happened:
            assert list(found.stamps) == ["new"]
            assert moment > 4
            break
        if what == "delete":
            assert len(found) == 0
        elif what == "upsert":
            np.testing.assert_array_equal(found.vectors, THEIRS[2:3])
            assert found.payloads == [{"path": "theirs.png"}]
            assert list(found.stamps) != ["new"]
        else:
            assert found.payloads[0]["price"] == -7.0
            if list(found.stamps) == ["new"]:
                np.testing.assert_array_equal(found.vectors, NEW[2:3])


# -- what cannot be opened, and answers that are wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"collection": "d"}, "no collection or alias 'd'"),
        ({"vector": "image"}, "no vector 'image'"),
        ({"url": "127.0.0.1:6333"}, "http://HOST:PORT"),
        ({"url": "localhost:6333"}, "http://HOST:PORT"),
        ({"url": "ftp://127.0.0.1:6333"}, "http://HOST:PORT"),
        ({"url": "http://127.0.0.1:seven"}, "refused"),
        ({"api_key": "secret\n"}, "perhaps a line break"),
        ({"api_key": "sécret"}, "characters that no key contains"),
    ],
)
def test_settings_that_are_wrong(place: Place, change: dict[str, Any], says: str) -> None:
    before = place.vectors()
    with pytest.raises(StoreRejected, match=says) as refusal:
        place.open(**change)
    assert "cret" not in one_line(refusal.value)
    assert place.vectors() == before


def test_another_server_answers(place: Place) -> None:
    """It may say anything."""
    others: list[tuple[Any, dict[str, Any]]] = [
        ("garbage", {}),
        ("status", {"status": 404}),
        ("status", {"status": 405}),
        ("spoiled", {"spoil": lambda result: {"name": "node-1", "tagline": "You Know, for Search"}}),
        ("spoiled", {"spoil": lambda result: {"title": "weaviate", "version": "1.2.3"}}),
        ("spoiled", {"spoil": lambda result: [1, 2, 3]}),
    ]
    for what, how in others:
        place.front.fail(what, times=10**6, **how)
        with pytest.raises(StoreRejected, match="does not answer like a Qdrant: correct `url`") as refusal:
            place.open()
        one_line(refusal.value)
        place.front.heal()
    with pytest.raises(StoreUnavailable, match="did not answer") as fault:
        place.open(url=place.front.url.replace("http:", "https:"))
    one_line(fault.value)


def test_an_alias_that_leads_nowhere(place: Place) -> None:
    def dangling(result: Any) -> Any:
        result.aliases[0].collection_name = "gone"
        return result

    place.front.fail("spoiled", path="aliases", spoil=dangling)
    with pytest.raises(StoreRejected, match="the alias 'a' leads to 'gone', which is no collection") as refusal:
        place.open(collection="a")
    one_line(refusal.value)
    with closing(place.open(collection="a")) as store:
        assert (store.describe().collection_id, store.describe().alias) == ("c", "a")


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (
            {"a": models.VectorParams(size=4, distance="Cosine"), "b": models.VectorParams(size=4, distance="Dot")},
            "'a', 'b': name one",
        ),
        ({}, "no dense vectors"),
        (models.VectorParams(size=4, distance="Manhattan"), "Manhattan"),
        (models.VectorParams(size=4, distance="Dot", datatype="uint8"), "uint8"),
        (
            models.VectorParams(size=4, distance="Dot", multivector_config={"comparator": "max_sim"}),
            "multi-vectors",
        ),
    ],
    ids=["several", "sparse", "manhattan", "uint8", "multi"],
)
def test_vectors_that_cannot_be_migrated(place: Place, vectors: Any, says: str) -> None:
    place.client.create_collection("d", vectors, sparse_vectors_config={"words": models.SparseVectorParams()})
    with pytest.raises(StoreRejected, match=says) as refusal:
        place.open(collection="d")
    one_line(refusal.value)


def test_half_precision_is_declared(place: Place) -> None:
    params = models.VectorParams(size=4, distance="Dot", datatype="float16")
    place.client.create_collection("d", params)
    with closing(place.open(collection="d")) as store:
        assert not store.capabilities.exact_vectors


def test_servers_that_are_too_old() -> None:
    params = models.VectorParams(size=4, distance=models.Distance.DOT)
    for version, vectors, needs in (("1.9.2", params, "1.10"), ("1.12.0", {"image": params}, "1.13")):
        with qdrant_front(version=version) as front:
            front.qdrant.client.create_collection("c", vectors)
            with pytest.raises(StoreRejected, match=f"is a Qdrant {version}: .* needs {needs} or newer") as refusal:
                open_store({"kind": "qdrant", "url": front.url, "collection": "c"}, write=True)
            one_line(refusal.value)


def test_keys() -> None:
    with qdrant_front(api_key="right", read_only_key="reader") as front:
        points = Points(front.qdrant.client, "c", "")
        points.create(models.Distance.DOT)
        points.insert(IDS, OLD, payloads_of(IDS))
        settings = {"kind": "qdrant", "url": front.url, "collection": "c"}
        for key in ("wrong", None):
            with pytest.raises(StoreRejected, match="correct `api_key`") as refusal:
                open_store({**settings, **({} if key is None else {"api_key": key})}, write=True)
            one_line(refusal.value)
        with closing(open_store({**settings, "api_key": "reader"}, write=True)) as store:
            page = store.read(IDS)
            for act in (lambda: store.write_vectors(IDS, NEW, "new"), lambda: store.insert(page)):
                before = len(front.requests)
                with pytest.raises(StoreRejected, match="correct `api_key`"):
                    act()
                assert len(front.requests) <= before + 1, "a refused batch is not halved where the key is refused"
            np.testing.assert_array_equal(store.read(IDS).vectors, OLD)
            assert any("http" in note for note in store.capabilities.notes)
        with closing(open_store({**settings, "api_key": "right"}, write=True)) as store:
            assert list(store.write_vectors(IDS, NEW, "new").written) == IDS


def points_of(result: Any) -> list[Any]:
    return result.points if isinstance(result, models.ScrollResult) else result


def too_short(result: Any) -> Any:
    points_of(result)[1].vector = [0.5] * 3
    return result


def nothing_instead_of_a_number(result: Any) -> Any:
    points_of(result)[1].vector[2] = None
    return result


def not_a_number(result: Any) -> Any:
    points_of(result)[1].vector[2] = float("nan")
    return result


def words(result: Any) -> Any:
    points_of(result)[1].vector = ["one", "two"]
    return result


def no_longer_in_order(result: Any) -> Any:
    points_of(result).reverse()
    return result


def the_same_again(result: Any) -> Any:
    result.next_page_offset = result.points[0].id
    return result


def nothing_and_more(result: Any) -> Any:
    result.points, result.next_page_offset = [], 3
    return result


def fewer(result: Any) -> Any:
    return points_of(result)[1:]


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (too_short, StoreRejected, "point 1 a vector that is not 16 numbers"),
        (words, StoreRejected, "point 1 a vector that is not 16 numbers"),
        (nothing_instead_of_a_number, StoreRejected, "not finite, of point 1"),
        (not_a_number, StoreRejected, "not finite, of point 1"),
        (no_longer_in_order, StoreRejected, "out of order"),
        (the_same_again, StoreRejected, "out of order"),
        (nothing_and_more, StoreRejected, "empty page"),
        (fewer, StoreUnavailable, "returned 1 of the requested points fewer"),
    ],
)
def test_an_answer_that_is_wrong(place: Place, spoil: Any, kind: type[Exception], says: str) -> None:
    store, before = place.store, place.vectors()
    acts: list[Any] = []
    if spoil is not fewer:
        acts.append(lambda: store.scan(after=None, limit=100))
    if spoil not in (no_longer_in_order, the_same_again, nothing_and_more):
        acts.append(lambda: store.read(IDS))
    for act in acts:
        place.front.fail("spoiled", times=10**6, path="points(/scroll)?$", spoil=spoil)
        with pytest.raises(kind, match=says) as refusal:
            act()
        one_line(refusal.value)
        place.front.heal()
    if spoil not in (no_longer_in_order, the_same_again, nothing_and_more):
        page = store.read(IDS)
        place.front.fail("spoiled", times=10**6, path="points$", spoil=spoil)
        with pytest.raises(kind, match=says):
            store.write_vectors(IDS, NEW, "new", expected=page)
        place.front.heal()
        assert place.vectors() == before
        assert store.count(stamp="new") == 0


def test_a_shadow_gets_the_settings_of_the_collection(place: Place) -> None:
    url = place.front.url
    with closing(QdrantClient(url=url, check_compatibility=False)) as client:
        client.create_collection(
            "d",
            {"image": models.VectorParams(size=DIM, distance="Dot", on_disk=True, hnsw_config={"m": 7})},
            hnsw_config=models.HnswConfigDiff(m=24, ef_construct=77),
            optimizers_config=models.OptimizersConfigDiff(indexing_threshold=123),
            quantization_config=models.ScalarQuantization(scalar=models.ScalarQuantizationConfig(type="int8")),
            shard_number=2,
            on_disk_payload=True,
        )
        client.create_payload_index("d", "path", field_schema=models.PayloadSchemaType.KEYWORD)
        client.create_payload_index("d", "name", field_schema=models.TextIndexParams(type="text", tokenizer="word"))
        with closing(place.open(collection="d")) as store:
            index = store.describe().index
            assert "m=7" in index
            assert "scalar" in index
            store.create_like("e", dim=8).close()
        old, new = client.get_collection("d"), client.get_collection("e")
        assert new.payload_schema == old.payload_schema
        assert isinstance(old.config.params.vectors, dict)
        params = old.config.params.vectors["image"].model_copy(update={"size": 8})
        assert new.config.params == old.config.params.model_copy(update={"vectors": {"image": params}})
        assert new.config.model_dump(exclude={"params"}) == old.config.model_dump(exclude={"params"})


def test_one_server_for_several_processes(tmp_path: Path) -> None:
    """And what it was told lies in its folder when it comes back."""
    folder = str(tmp_path / "qdrant")
    settings = {"kind": "qdrant", "collection": "c"}
    with qdrant_process(folder) as url:
        with closing(QdrantClient(url=url, check_compatibility=False)) as client:
            points = Points(client, "c", "")
            points.create(models.Distance.DOT)
            points.insert(IDS, OLD, payloads_of(IDS))
        with closing(open_store({**settings, "url": url}, write=True)) as store:
            assert list(store.write_vectors(IDS[:5], NEW[:5], "new").written) == IDS[:5]
    with qdrant_process(folder) as url, closing(open_store({**settings, "url": url}, write=True)) as store:
        assert (store.count(), store.count(stamp="new")) == (20, 5)
        np.testing.assert_array_equal(store.read_vectors(IDS[:5]).vectors, NEW[:5])
