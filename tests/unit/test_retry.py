"""A store that goes away for a moment, seen through `RetryingStore`."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from migrator import retry
from migrator.adapters.base import StoreRejected, StoreUnavailable
from migrator.retry import RetryingStore


class Fragile:
    """Fails so many times before it answers."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures, self.calls = failures, 0
        self.error = error or StoreUnavailable("away", retry_after=0.0)

    def _try(self) -> None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise self.error

    @property
    def capabilities(self) -> str:
        self._try()
        return "able"

    def count(self, *, stamp: str | None = None) -> int:
        self._try()
        return 7 if stamp is None else 3

    def open_collection(self, collection_id: str) -> Fragile:
        self._try()
        return Fragile(2)

    def drop(self) -> None:
        self._try()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting, and what would have been waited for."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    return waits


def seen(store: Fragile, seconds: float = 60.0) -> Any:
    return RetryingStore(store, seconds=seconds)  # type: ignore[arg-type]


def test_every_call_is_tried_again() -> None:
    assert seen(Fragile(3)).count() == 7
    assert seen(Fragile(3)).count(stamp="s") == 3
    assert seen(Fragile(3)).capabilities == "able"


def test_other_collections_are_tried_again_too() -> None:
    assert seen(Fragile(1)).open_collection("other").count() == 7


def test_it_gives_up_in_the_end() -> None:
    store = Fragile(10**6)
    with pytest.raises(StoreUnavailable, match="away"):
        seen(store, seconds=0.0).count()
    assert store.calls == 1
    with pytest.raises(StoreUnavailable, match="away"):
        seen(Fragile(10**6, StoreUnavailable("away", retry_after=100.0)), seconds=60.0).count()


def test_the_stores_own_advice_is_heard(at_once: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, retry.__name__):
        assert seen(Fragile(1, StoreUnavailable("overloaded", retry_after=9.0))).count() == 7
    assert sum(at_once) >= 9.0
    assert "overloaded; trying again in 9 s" in caplog.text


def test_a_refusal_is_not_tried_again() -> None:
    store = Fragile(1, StoreRejected("no"))
    with pytest.raises(StoreRejected):
        seen(store).count()
    assert store.calls == 1


def test_a_collection_is_dropped_once() -> None:
    store = Fragile(1)
    with pytest.raises(StoreUnavailable):
        seen(store).drop()
    assert store.calls == 1
