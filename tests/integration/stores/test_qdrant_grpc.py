"""The Qdrant adapter over gRPC, on a real gRPC server: the contract of all stores, and what becomes of errors."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from migrator.adapters.base import StoreRejected, StoreUnavailable
from migrator.adapters.registry import open_store
from migrator.adapters.testing import Make, payloads_of
from migrator.retry import with_retries
from tests.integration.stores.test_qdrant import Points, QdrantContract, made_with
from tests.integration.stores.test_qdrant_rest import IDS, NEW, OLD, THEIRS, Place, one_line
from tests.qdrant_front import Front, Refusal, qdrant_front
from tests.qdrant_grpc import grpc_door


@pytest.fixture(scope="module")
def server() -> Iterator[Front]:
    with qdrant_front() as front:
        yield front


@pytest.fixture(scope="module")
def door(server: Front) -> Iterator[int]:
    with grpc_door(server) as port:
        yield port


class TestOverGrpc(QdrantContract):
    @pytest.fixture
    def make(self, server: Front, door: int) -> Iterator[Make]:
        with closing(QdrantClient(url=server.url, check_compatibility=False)) as application:
            settings = {"url": server.url, "grpc": True, "grpc_port": door}
            yield made_with(application, models.Distance.DOT, "", settings)


@pytest.fixture
def place() -> Iterator[Place]:
    with qdrant_front() as front, grpc_door(front) as port:
        place = Place(front, grpc=True, grpc_port=port)
        with closing(place.store):
            yield place


@pytest.mark.parametrize(
    ("what", "how", "kind", "advice", "says"),
    [
        ("status", {"status": 429, "retry_after": "7"}, StoreUnavailable, 7, "overloaded"),
        ("status", {"status": 429}, StoreUnavailable, None, "RESOURCE_EXHAUSTED"),
        ("status", {"status": 503}, StoreUnavailable, None, "UNAVAILABLE"),
        ("status", {"status": 500}, StoreUnavailable, None, "INTERNAL"),
        ("status", {"status": 408}, StoreUnavailable, None, "DEADLINE_EXCEEDED"),
        ("status", {"status": 418}, StoreUnavailable, None, "UNKNOWN"),
        ("status", {"status": 400}, StoreRejected, None, r"refused \(INVALID_ARGUMENT\): a fault of the kind 400"),
        ("status", {"status": 404}, StoreRejected, None, "NOT_FOUND"),
        ("status", {"status": 401}, StoreRejected, None, "correct `api_key`"),
        ("status", {"status": 403}, StoreRejected, None, "correct `api_key`"),
        ("drop", {}, StoreUnavailable, None, "UNAVAILABLE"),
        ("slow", {}, StoreUnavailable, None, "DEADLINE_EXCEEDED"),
    ],
)
def test_a_status_in_the_words_of_this_package(
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


@pytest.mark.parametrize("what", ["status", "drop_after", "half", "torn", "acknowledged"])
def test_a_write_that_went_wrong_is_repaired_by_repeating_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    monkeypatch.setattr("migrator.retry._backoff", lambda state: 0.0)
    store = place.store
    for moment in place.moments():
        page = store.read(IDS)
        place.client.delete("c", [3])
        place.upsert(5)
        with place.fault(what, skip=moment):
            report = with_retries(lambda: store.write_vectors(IDS, NEW, "new", expected=page), seconds=20)  # noqa: B023
        ours = [item for item in IDS if item not in (3, 5)]
        assert (list(report.written), list(report.deleted), list(report.changed)) == (ours, [3], [5]), moment
        found = store.read([4, 5])
        np.testing.assert_array_equal(found.vectors, [NEW[4], THEIRS[5]])
        assert list(found.stamps) == ["new", None]


def test_a_point_that_goes_during_the_write_or_is_refused(place: Place) -> None:
    def meddle(request: str, body: bytes) -> None:
        if request.endswith("/points/batch"):
            place.client.delete("c", [3])
            if b'"id":7,' in body:
                raise Refusal(400, "Wrong input: there is something about this point")

    store = place.store
    page = store.read(IDS)
    place.front.before = meddle
    report = store.write_vectors(IDS, NEW, "new", expected=page)
    place.front.before = None
    assert (list(report.deleted), set(report.rejected), list(report.changed)) == ([3], {7}, [])
    assert list(report.written) == [item for item in IDS if item not in (3, 7)]
    np.testing.assert_array_equal(store.read([7]).vectors, OLD[7:8])


def test_a_vector_that_is_not_finite_is_refused(place: Place) -> None:
    """gRPC carries what JSON cannot."""
    spoilt = OLD[:1].copy()
    spoilt[0, 2] = np.nan

    def spoil(result: Any) -> Any:
        result.points[0].vector = spoilt[0].tolist()
        return result

    place.front.fail("spoiled", path="scroll", spoil=spoil)
    with pytest.raises(StoreRejected, match="not finite, of point 0"):
        place.store.scan(after=None, limit=5)


def test_keys() -> None:
    with qdrant_front(api_key="right", read_only_key="reader") as front, grpc_door(front) as port:
        points = Points(front.qdrant.client, "c", "")
        points.create(models.Distance.DOT)
        points.insert(IDS, OLD, payloads_of(IDS))
        settings = {"kind": "qdrant", "url": front.url, "grpc": True, "grpc_port": port, "collection": "c"}
        with pytest.raises(StoreRejected, match="correct `api_key`") as refusal:
            open_store({**settings, "api_key": "wrong"}, write=True)
        one_line(refusal.value)
        with (
            closing(open_store({**settings, "api_key": "reader"}, write=True)) as store,
            pytest.raises(StoreRejected, match="correct `api_key`"),
        ):
            store.write_vectors(IDS, NEW, "new")
        with closing(open_store({**settings, "api_key": "right"}, write=True)) as store:
            assert list(store.write_vectors(IDS, NEW, "new").written) == IDS


def test_a_door_that_is_closed() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens there
        settings = {"url": "http://127.0.0.1", "grpc": True, "grpc_port": taken.getsockname()[1], "timeout": 2}
        with pytest.raises(StoreUnavailable, match="did not answer") as fault:
            open_store({"kind": "qdrant", "collection": "c", **settings}, write=True)
    one_line(fault.value)
