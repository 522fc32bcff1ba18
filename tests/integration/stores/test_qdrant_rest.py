"""The Qdrant adapter over REST: the contract of all stores, and every fault that a server or a network can have."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from adapters.base import ItemId, Page, Store, StoreRejected, StoreUnavailable
from adapters.qdrant import QdrantStore
from adapters.registry import open_store
from migrator.retrying import patiently
from tests.integration.stores.contract import Make, payloads_of, unit_vectors
from tests.integration.stores.test_qdrant import UUIDS, Points, QdrantContract, made_with
from tests.qdrant_front import Front, Refusal, qdrant_front


@pytest.fixture(scope="module")
def server() -> Iterator[Front]:
    """One for all the tests that break nothing."""
    with qdrant_front() as front:
        yield front


@pytest.fixture(scope="module")
def application(server: Front) -> Iterator[QdrantClient]:
    with closing(QdrantClient(url=server.url, check_compatibility=False)) as client:
        yield client


@pytest.mark.parametrize(
    ("distance", "vector"),
    [(models.Distance.COSINE, ""), (models.Distance.DOT, "image")],
    ids=["cosine", "dot-named"],
)
class TestOverRest(QdrantContract):
    @pytest.fixture
    def make(self, server: Front, application: QdrantClient, distance: models.Distance, vector: str) -> Make:
        return made_with(application, distance, vector, {"url": server.url})


class TestUuidsOverRest(QdrantContract):
    id_strategy = UUIDS

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        rng = np.random.default_rng(3)
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(200)]

    @pytest.fixture
    def make(self, server: Front, application: QdrantClient) -> Make:
        return made_with(application, models.Distance.EUCLID, "", {"url": server.url})


@pytest.fixture(scope="module")
def old_server() -> Iterator[Front]:
    with qdrant_front(version="1.10.1") as front:
        yield front


class TestAnOldServer(QdrantContract):
    """Without conditional updates."""

    @pytest.fixture
    def make(self, old_server: Front) -> Iterator[Make]:
        with closing(QdrantClient(url=old_server.url, check_compatibility=False)) as client:
            yield made_with(client, models.Distance.COSINE, "", {"url": old_server.url})


# -- faults -----------------------------------------------------------------------------------------------------------

IDS: list[ItemId] = list(range(20))
OLD, NEW, THEIRS = unit_vectors(20), unit_vectors(20, seed=1), unit_vectors(20, seed=2)


class Place:
    """A front with the collection "c" and the alias "a"; the application reaches it without going over the network."""

    def __init__(self, front: Front) -> None:
        self.front, self.client = front, front.qdrant.client
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
        return open_store({"kind": "qdrant", "url": self.front.url, "collection": "c", **settings}, write=True)

    def upsert(self, item: int) -> None:
        points = [models.PointStruct(id=item, vector=THEIRS[item].tolist(), payload={"path": "theirs.png"})]
        self.client.upsert("c", points)

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
    monkeypatch.setattr("migrator.retrying._backoff", lambda state: 0.0)


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
        page = store.read(IDS, vectors=True, payload=True)
        place.client.delete("c", [3])
        place.upsert(5)
        with place.fault(what, skip=moment, **how):
            report = patiently(lambda: store.write_vectors(IDS, NEW, stamp, made_from=page), seconds=20)  # noqa: B023
        ours = [item for item in IDS if item not in (3, 5)]
        assert (list(report.written), list(report.gone), list(report.changed)) == (ours, [3], [5]), moment
        assert dict(report.rejected) == {}
        found = store.read(IDS, vectors=True, payload=True)
        assert list(found.ids) == [item for item in IDS if item != 3]
        assert found.vectors is not None
        for item, vector, payload, its in zip(
            found.ids, found.vectors, found.payloads or (), found.stamps, strict=True
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
        page = store.read(IDS, vectors=True, payload=True)

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
            return store.forget_migration()

        with place.fault(what, skip=moment):
            result = patiently(act, seconds=20)
        now = store.read(IDS, vectors=True, payload=False)
        if deed == "insert":
            assert (list(result), set(now.stamps)) == (IDS, {"new"})
            np.testing.assert_array_equal(now.vectors, NEW)
        elif deed == "delete":
            assert list(now.ids) == IDS[10:]
        elif deed == "alias":
            assert [found.collection_name for found in place.client.get_aliases().aliases] == ["other"]
        elif deed == "create":
            assert place.client.get_collection("like").config.params.vectors.size == 8
        else:
            assert set(now.stamps) == {None}


def test_a_write_that_is_not_repeated_leaves_no_stamp_that_lies(any_place: Place) -> None:
    """The process gives up, or is killed, after any of its requests, whole or half done."""
    place = any_place
    for what in ("drop", "drop_after", "half"):
        for moment in place.moments():
            store = place.store
            page = store.read(IDS, vectors=True, payload=True)
            with place.fault(what, skip=moment), contextlib.suppress(StoreUnavailable):
                store.write_vectors(IDS, NEW, "new", made_from=page)
            found = store.read(IDS, vectors=True, payload=True)
            assert found.vectors is not None
            for item, vector, stamp in zip(found.ids, found.vectors, found.stamps, strict=True):
                if stamp == "new":
                    np.testing.assert_array_equal(vector, NEW[item])
                elif stamp is None:  # or a claim: then it may be either
                    np.testing.assert_array_equal(vector, OLD[item])
            assert found.payloads == payloads_of(IDS)
            assert store.count(stamp="new") == list(found.stamps).count("new")


def test_a_server_that_stays_away_is_waited_for_until_the_deadline(place: Place) -> None:
    store = place.store
    before = len(place.front.requests)
    place.front.fail("status", status=503, times=10**6)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        patiently(lambda: store.scan(after=None, limit=5), seconds=0.8)
    assert time.monotonic() - began < 2
    assert 2 <= len(place.front.requests) - before <= 5


def test_the_servers_advice_is_heard(place: Place) -> None:
    store = place.store
    place.front.fail("status", status=429, retry_after="1")
    began = time.monotonic()
    assert len(patiently(lambda: store.scan(after=None, limit=5), seconds=10)) == 5
    assert time.monotonic() - began >= 1
    # Advice that goes beyond the deadline is not waited for.
    before = len(place.front.requests)
    place.front.fail("status", status=429, retry_after="60", times=10**6)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        patiently(lambda: store.scan(after=None, limit=5), seconds=5)
    assert time.monotonic() - began < 1
    assert len(place.front.requests) == before + 1


@pytest.mark.parametrize("deed", ["write", "insert"])
def test_a_point_that_is_refused_does_not_stop_the_others(place: Place, deed: str) -> None:
    def refuse(request: str, body: bytes) -> None:
        if request.startswith("PUT") and any(point["id"] in (7, 12) for point in json.loads(body)["points"]):
            raise Refusal(400, "Wrong input: there is something about this point")

    store = place.store
    assert isinstance(store, QdrantStore)
    page = store.read(IDS, vectors=True, payload=True)
    store._index_stamps()
    place.front.before = refuse
    if deed == "write":
        report = store.write_vectors(IDS, NEW, "new", made_from=page)
    else:
        report = store.insert(Page(page.ids, NEW, page.payloads, ["new"] * 20))
    place.front.before = None
    assert set(report.rejected) == {7, 12}
    assert all("something about this point" in one_line(Exception(why)) for why in report.rejected.values())
    assert list(report.written) == [item for item in IDS if item not in (7, 12)]
    now = store.read([6, 7, 12], vectors=True, payload=True)
    np.testing.assert_array_equal(now.vectors, [NEW[6], OLD[7], OLD[12]])
    assert list(now.stamps) == ["new", None, None]


def test_a_point_that_a_server_misses_and_has_does_not_hold_us_for_ever(place: Place) -> None:
    def refuse(request: str, body: bytes) -> None:
        if request == "PUT /collections/c/points/vectors":
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
        page = store.read(IDS, vectors=True, payload=True)
        place.front.before = interpose
        report = store.write_vectors(IDS, NEW, "new", made_from=page)
        place.front.before = None
        assert sorted([*report.written, *report.gone, *report.changed]) == IDS
        assert set(IDS) - {2} <= set(report.written)
        found = store.read([2], vectors=True, payload=True)
        assert found.payloads is not None
        if not happened:
            assert list(found.stamps) == ["new"]
            assert moment > 5
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
