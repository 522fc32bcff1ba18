from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.adapters.base import ItemId, Page, order_key
from migrator.backfill import transfer as module
from migrator.backfill.chunks import cut_catch_up, cut_first_pass
from migrator.backfill.throttle import Throttle
from migrator.backfill.transfer import InPlace
from migrator.ledger import Chunk, Ledger, Migration, this_process

STAMP = "new-encoder"

items = st.lists(
    st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.integers(-20, 20), st.text(st.characters(codec="utf-8"), max_size=5)
    ),
    max_size=60,
).map(lambda found: list({(type(item), item): item for item in found}.values()))


class Ids:
    """A store that knows its ids and which of them are stamped; it answers in the total order that all stores keep."""

    def __init__(self, ids: Iterable[ItemId], stamped: Iterable[ItemId] = ()) -> None:
        self.stamps: dict[ItemId, bool] = dict.fromkeys(ids, False) | dict.fromkeys(stamped, True)
        self.limits: list[int] = []

    def _page(self, ids: Iterable[ItemId], after: ItemId | None, limit: int) -> list[ItemId]:
        self.limits.append(limit)
        return sorted((i for i in ids if after is None or order_key(i) > order_key(after)), key=order_key)[:limit]

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        return self._page((i for i in self.stamps if up_to is None or order_key(i) <= order_key(up_to)), after, limit)

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        return self._items(self.scan_ids(after=after, up_to=up_to, limit=limit))

    def read(self, ids: Sequence[ItemId]) -> Page:
        return self._items([item for item in ids if item in self.stamps])

    read_vectors = read_payloads = read_stamps = read

    def _items(self, ids: list[ItemId]) -> Page:
        stamps = [STAMP if self.stamps[item] else None for item in ids]
        return Page(ids, np.zeros((len(ids), 1), np.float32), [{}] * len(ids), stamps)

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        assert stamp == STAMP
        return self._page((item for item, done in self.stamps.items() if not done), after, limit)


class Passes:
    """The part of a ledger that cutting uses."""

    def __init__(self) -> None:
        self.passes: list[list[tuple[ItemId | None, ItemId, int]]] = []
        self.lists: Sequence[Sequence[ItemId]] | None = None

    def add_chunks(
        self,
        _: int,
        number: int,
        ranges: Sequence[tuple[ItemId | None, ItemId, int]],
        lists: Sequence[Sequence[ItemId]] | None = None,
    ) -> None:
        if ranges and number == len(self.passes):
            self.passes.append(list(ranges))
            self.lists = self.lists or lists

    def counts(self, _: int) -> Any:
        return SimpleNamespace(passes=len(self.passes))

    def chunks(self, number: int) -> list[Chunk]:
        return [
            Chunk(
                pass_number=number, ordinal=ordinal, items=count, upto_id=json.dumps(up_to),
                after_id=None if after is None else json.dumps(after),
                ids=None if number or self.lists is None else json.dumps(self.lists[ordinal]),
            )
            for ordinal, (after, up_to, count) in enumerate(self.passes[number])
        ] if number < len(self.passes) else []  # fmt: skip


MIGRATION = Migration(id=1)


class NothingRecorded:
    """An undo log before the first write."""

    def read(self, _: Chunk) -> None:
        return None


def in_place(store: Ids) -> InPlace:
    return InPlace(store, undo=NothingRecorded(), stamp=STAMP)  # type: ignore[arg-type]


def first_pass(store: Ids, size: int, order: Sequence[ItemId] | None = None) -> Passes:
    ledger = Passes()
    cut = cut_first_pass(in_place(store), ledger, MIGRATION, size=size, order=order)  # type: ignore[arg-type]
    assert cut == len(ledger.chunks(0))
    return ledger


def catch_up(store: Ids, ledger: Passes, size: int, leave: Iterable[ItemId] = ()) -> int:
    return cut_catch_up(in_place(store), ledger, MIGRATION, size=size, leave=set(leave))  # type: ignore[arg-type]


def to_do(store: Ids, chunk: Chunk, leave: Iterable[ItemId] = ()) -> list[ItemId]:
    return list(in_place(store).load_chunk(chunk, set(leave)).page.ids)


def real_ledger(folder: Path) -> tuple[Ledger, Migration]:
    """A ledger with a migration in its backfill stage."""
    ledger = Ledger(f"sqlite:///{folder}/migrator.db")
    for encoder in ("old", "new"):
        ledger.save_encoder(encoder, "{}")
    ledger.save_plan(
        "m", collection="c", source="c", alias=None,
        strategy="in_place", old_encoder_id="old", new_encoder_id="new", fingerprint="", bound={},
        content={},
    )  # fmt: skip
    migration = ledger.migration("m")
    assert migration is not None
    return ledger, ledger.move(migration, stage="backfill", state="active", event="backfill")


def leased(ledger: Ledger, migration: Migration) -> list[Chunk]:
    """All chunks, as a run gets them."""
    return list(iter(lambda: ledger.lease_chunk(migration.id, this_process(), seconds=60, leave=set()), None))


def exactly(found: Iterable[ItemId]) -> list[str]:
    return [repr(item) for item in found]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(module, "IDS", 7)


# --- the first pass --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ids=items, size=st.integers(1, 15))
def test_every_id_is_in_one_chunk_and_in_order(ids, size):
    store = Ids(ids)
    ledger = first_pass(store, size)
    chunks = ledger.chunks(0)
    assert exactly(item for chunk in chunks for item in to_do(store, chunk)) == exactly(sorted(ids, key=order_key))
    assert [len(to_do(store, chunk)) for chunk in chunks] == [chunk.items for chunk in chunks]
    assert all(chunk.items == size for chunk in chunks[:-1])
    assert [chunk.after_id for chunk in chunks] == [None, *(chunk.upto_id for chunk in chunks[:-1])][: len(chunks)]


def test_ranges_go_through_a_real_ledger(tmp_path):
    ids: list[ItemId] = [-(2**62), -3, 7, 2**62, "", "'; DROP TABLE chunks; --", "7", 'a"b\\', "é✓\U0001f600"]
    ledger, migration = real_ledger(tmp_path)
    store = Ids(ids)
    assert cut_first_pass(in_place(store), ledger, migration, size=2) == 5
    assert exactly(item for chunk in leased(ledger, migration) for item in to_do(store, chunk)) == exactly(ids)
    chunks = ledger.chunks(migration.id)

    store.stamps.update({"new one": False, 8: False})
    cut_first_pass(in_place(store), ledger, migration, size=2)
    assert [(c.after_id, c.upto_id) for c in ledger.chunks(migration.id)] == [(c.after_id, c.upto_id) for c in chunks]
    store.stamps.update(dict.fromkeys(ids, True))
    assert cut_catch_up(in_place(store), ledger, migration, size=1, leave=[]) == 2
    assert [(c.pass_number, c.upto_id) for c in ledger.chunks(migration.id)[5:]] == [(1, "8"), (1, '"new one"')]
    ledger.close()


def test_an_empty_collection_has_no_chunks():
    assert first_pass(Ids([]), 10).passes == []


@settings(deadline=None)
@given(ids=items, size=st.integers(1, 15), data=st.data())
def test_what_is_stamped_deleted_or_new_changes_no_boundary(ids, size, data):
    """The chunk asks the store what is left in its range; the range itself is what was stored."""
    store = Ids(ids)
    ledger = first_pass(store, size)
    some = st.lists(st.sampled_from(ids), unique_by=repr) if ids else st.just([])
    stamped, deleted, left, new = data.draw(some), data.draw(some), data.draw(some), data.draw(items)
    store.stamps.update(dict.fromkeys(stamped, True))
    for item in deleted:
        del store.stamps[item]
    for item in new:
        store.stamps.setdefault(item, False)
    found = [item for chunk in ledger.chunks(0) for item in to_do(store, chunk, left)]
    last = max(map(order_key, ids), default=None)
    expected = [
        item
        for item, done in store.stamps.items()
        if not done and item not in left and last is not None and order_key(item) <= last
    ]
    assert exactly(found) == exactly(sorted(expected, key=order_key))


def test_the_bounds_of_a_range():
    store = Ids(range(10))
    (_, middle, _) = first_pass(store, 4).chunks(0)
    assert to_do(store, middle) == [4, 5, 6, 7]
    store.stamps[5] = True
    assert to_do(store, middle, leave=[7]) == [4, 6]
    store.stamps["5"] = False
    assert to_do(store, middle) == [4, 6, 7]


def test_a_chunk_with_nothing_left_looks_no_further():
    store = Ids(range(1000))
    chunk = first_pass(store, 10).chunks(0)[0]
    store.stamps.update(dict.fromkeys(range(10), True))
    store.limits.clear()
    assert to_do(store, chunk) == []
    assert store.limits == [11], "one page, of a chunk's size and not of the collection's"


# --- a first pass in another order -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(ids=items, size=st.integers(1, 15), data=st.data())
def test_a_list_is_what_was_cut_whatever_happens_since(ids, size, data):
    store = Ids(ids)
    order = data.draw(st.permutations(ids))
    ledger = first_pass(store, size, order)
    chunks = ledger.chunks(0)
    assert exactly(item for chunk in chunks for item in to_do(store, chunk)) == exactly(order)
    assert [chunk.items for chunk in chunks] == [len(to_do(store, chunk)) for chunk in chunks]
    assert all(chunk.items == size for chunk in chunks[:-1])
    last = max(ids, key=order_key, default=None)
    assert all((chunk.after_id, chunk.upto_id) == (None, json.dumps(last)) for chunk in chunks), "the range covers all"

    some = st.lists(st.sampled_from(ids), unique_by=repr) if ids else st.just([])
    stamped, deleted, left, new = data.draw(some), data.draw(some), data.draw(some), data.draw(items)
    store.stamps.update(dict.fromkeys(stamped, True))
    for item in deleted:
        del store.stamps[item]
    arrived = [item for item in new if item not in ids]
    store.stamps.update(dict.fromkeys(arrived, False))
    due = [item for item in order if not store.stamps.get(item, True) and item not in left]
    assert exactly(item for chunk in chunks for item in to_do(store, chunk, left)) == exactly(due)

    # What came since is in no list, whatever range covers it: catching up finds it.
    store.stamps.update(dict.fromkeys(due, True))
    number = len(ledger.passes)
    assert catch_up(store, ledger, size, left) == len(arrived)
    found = [item for chunk in ledger.chunks(number) for item in to_do(store, chunk, left)]
    assert exactly(found) == exactly(sorted(arrived, key=order_key))


def test_lists_go_through_a_real_ledger(tmp_path):
    order: list[ItemId] = ["7", 2**62, "", 7, "'; DROP TABLE chunks; --", -3, 'a"b\\', "é✓\U0001f600\x00", -(2**62)]
    ledger, migration = real_ledger(tmp_path)
    store = Ids(order)
    assert cut_first_pass(in_place(store), ledger, migration, size=2, order=order) == 5
    assert cut_first_pass(in_place(store), ledger, migration, size=3, order=order[::-1]) == 3
    chunks = leased(ledger, migration)
    assert [chunk.items for chunk in chunks] == [2, 2, 2, 2, 1], "the first cut is the one that counts"
    assert exactly(item for chunk in chunks for item in to_do(store, chunk)) == exactly(order)
    ledger.close()


# --- catching up -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ids=items, arrived=items, size=st.integers(1, 15), data=st.data())
def test_catching_up_finds_what_arrived_once_and_leaves_out_failures(ids, arrived, size, data):
    store = Ids([], stamped=ids)
    new = [item for item in arrived if item not in store.stamps]
    store.stamps.update(dict.fromkeys(new, False))
    failing = data.draw(st.lists(st.sampled_from(new), unique_by=repr)) if new else []
    ledger = Passes()
    if ids:
        ledger.add_chunks(1, 0, [(None, max(ids, key=order_key), len(ids))])
    before = len(ledger.passes)
    expected = exactly(sorted((item for item in new if item not in failing), key=order_key))
    assert catch_up(store, ledger, size, failing) == len(expected)
    cut = ledger.chunks(before)
    assert exactly(item for chunk in cut for item in to_do(store, chunk, failing)) == expected
    assert sum(chunk.items for chunk in cut) == len(expected)

    store.stamps.update(dict.fromkeys((item for item in new if item not in failing), True))
    passes = len(ledger.passes)
    assert catch_up(store, ledger, size, failing) == 0
    assert len(ledger.passes) == passes, "a pass without items is not stored"


def test_two_processes_that_catch_up_at_once_store_one_pass():
    """Else the second pass would hold what the first is working on, and items would be encoded twice."""
    store, ledger = Ids(range(20)), Passes()
    ledger.add_chunks(1, 0, [(None, -1, 1)])

    class Overtaken(Ids):
        def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
            if after is None and len(ledger.passes) == 1:
                assert catch_up(store, ledger, 5) == 20
            return super().unstamped(stamp, after=after, limit=limit)

    assert catch_up(Overtaken(range(20)), ledger, 5) == 20
    assert [len(ranges) for ranges in ledger.passes] == [1, 4]


# --- leaving room for others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nice", "worked", "rests"),
    [
        (0.0, 2.0, []),
        (1.0, 2.0, [2.0]),
        (0.5, 4.0, [2.0]),
        pytest.param(0.5, 8 * 3600.0, [15.0], id="stopped for a night"),
    ],
)
def test_the_throttle_rests_in_proportion_to_the_work(monkeypatch, nice, worked, rests):
    clock, waited = [100.0], []
    monkeypatch.setattr("migrator.backfill.throttle.time.monotonic", lambda: clock[0])

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout)
            clock[0] += timeout or 0
            return False

    resting = Throttle(nice, Stop())
    resting.rest()  # starts the clock
    for _ in range(2):
        clock[0] += worked
        resting.rest()
    assert waited == rests * 2, "the rest itself is not work"


def test_a_stop_ends_the_rest(monkeypatch):
    stop = threading.Event()
    stop.set()
    resting = Throttle(1e6, stop)
    resting.rest()
    later = time.monotonic() + 60
    monkeypatch.setattr("migrator.backfill.throttle.time.monotonic", lambda: later)
    resting.rest()  # would be sixty million seconds
