"""Leases as a run holds them: prolonged by a heartbeat, proved before a write, and over before the ledger's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.backfill.leases import Leases
from migrator.errors import TemporarilyUnavailable
from migrator.ledger import Chunk, LeaseLost, Ledger, Migration, this_process
from tests.unit.test_ledger import open_backfill

SECONDS = 60.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


class Clock:
    """Our own count of time, set by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    passed = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        passed.wait(0.01)
    raise AssertionError("did not come true")


def make(ledger: Ledger, migration: Migration, clock: Clock, seconds: float = SECONDS) -> Leases:
    return Leases(ledger, migration.id, this_process(), seconds=seconds, clock=clock)


def taken(leases: Leases) -> Chunk:
    chunk = leases.acquire(set())
    assert chunk is not None
    return chunk


def test_a_request_must_fit_into_what_is_left_of_the_lease(ledger: Ledger) -> None:
    clock = Clock()
    leases = make(ledger, open_backfill(ledger, chunks=1), clock)
    chunk = taken(leases)
    leases.check(chunk, 30)
    clock.at += 29.5
    leases.check(chunk, 30)
    clock.at += 1  # 29.5 s are left
    leases.check(chunk, 29)
    with pytest.raises(LeaseLost, match="run the command again"):
        leases.check(chunk, 30)


def test_time_counts_from_before_the_ledger_was_asked(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    leases = make(ledger, open_backfill(ledger, chunks=1), clock)
    lease_chunk = ledger.lease_chunk

    def slow(*arguments: object, **options: object) -> Chunk | None:
        found = lease_chunk(*arguments, **options)  # type: ignore[arg-type]
        clock.at += 50  # the answer took its time
        return found

    monkeypatch.setattr(ledger, "lease_chunk", slow)
    chunk = taken(leases)
    leases.check(chunk, 9)
    with pytest.raises(LeaseLost):
        leases.check(chunk, 10)


def test_a_lease_that_another_one_has_now_is_lost_whatever_our_clock_says(ledger: Ledger) -> None:
    clock = Clock()
    migration = open_backfill(ledger, chunks=1)
    leases = make(ledger, migration, clock)
    chunk = taken(leases)
    ledger.return_leases(migration.id, leases._owner)
    again = ledger.lease_chunk(migration.id, leases._owner, seconds=60, leave=set())
    assert again is not None
    assert again.lease_epoch == chunk.lease_epoch + 1
    with pytest.raises(LeaseLost, match="taken over"):
        leases.check(chunk, 1)


@pytest.mark.parametrize("state", ["rolling_back", "finished"])
def test_nothing_is_written_once_the_migration_has_moved_on(ledger: Ledger, state: str) -> None:
    migration = open_backfill(ledger, chunks=1)
    leases = make(ledger, migration, Clock())
    chunk = taken(leases)
    ledger.move(migration, state=state, event="on")  # type: ignore[arg-type]
    with pytest.raises(LeaseLost):
        leases.check(chunk, 1)
    assert ledger.extend_leases(migration.id, leases._owner, seconds=60) == set(), "a rollback waits for no new time"


def test_a_heartbeat_prolongs_what_is_held_and_notices_what_is_not(ledger: Ledger) -> None:
    clock = Clock()
    migration = open_backfill(ledger, chunks=2)
    with make(ledger, migration, clock, seconds=0.3) as leases:
        first, second = taken(leases), taken(leases)
        clock.at += 100
        until(lambda: holds(leases, first))
        ledger.return_leases(migration.id, leases._owner)
        other = ledger.lease_chunk(migration.id, this_process(), seconds=60, leave={second.id})
        assert other is not None
        until(lambda: not holds(leases, first))
        assert not holds(leases, second)


def holds(leases: Leases, chunk: Chunk) -> bool:
    try:
        leases.check(chunk, 0)
    except LeaseLost:
        return False
    return True


def test_a_ledger_that_cannot_be_asked_lets_nothing_through(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    migration = open_backfill(ledger, chunks=1)
    asked = threading.Event()

    def unreachable(*_: object, **__: object) -> set[int]:
        asked.set()
        raise TemporarilyUnavailable("the ledger does not answer")

    with make(ledger, migration, Clock(), seconds=0.3) as leases:
        chunk = taken(leases)
        with monkeypatch.context() as patched:
            patched.setattr(ledger, "check_lease", unreachable)
            patched.setattr(ledger, "extend_leases", unreachable)
            with pytest.raises(TemporarilyUnavailable):
                leases.check(chunk, 0)
            asked.clear()
            assert asked.wait(10), "the heartbeat tries again"
    assert ledger.live_leases(migration.id) == [], "what is held is returned at the end"
