"""How new vectors reach the queries: into the items themselves (`InPlace`), or into copies beside them (`Shadow`).

A strategy says which items a chunk still has to do, loads them, and writes them with their new vectors.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import Fence, ItemId, Page, Store, WriteReport, order_key
from migrator.adapters.iterate import IDS, ITEMS, iter_ids, pages, read_whole, whole_pages
from migrator.artifacts.copy_log import BEGUN, Copies, Copy, CopyLog, digests
from migrator.artifacts.undo_log import OldVectors, UndoLog
from migrator.ledger import Chunk, Ledger, Migration
from migrator.lifecycle.strategy import STRATEGIES
from migrator.project import Project

REMEMBERED = 1_000_000
"""Ids of a catch-up pass that are kept from its cutting, so that its chunks need not compare everything again."""


@dataclass(frozen=True, slots=True)
class LoadedChunk:
    """A chunk's items that are still to be done, as they are."""

    chunk: Chunk
    page: Page
    """Items to embed, with vectors and payloads."""
    repeated: Sequence[ItemId] = ()
    """Items that an earlier, unfinished attempt at this chunk has already written."""
    surplus: Sequence[ItemId] = ()
    """Copies whose items were deleted."""


class Transfer(Protocol):
    """What the backfill needs of a strategy. `leave` holds items that are not to be touched: open failures."""

    source: Store
    """The collection that is migrated."""

    def everything(self) -> Iterator[ItemId]:
        """All ids, in order: the first pass."""
        ...

    def outstanding(self, leave: Collection[ItemId]) -> Iterator[ItemId]:
        """Ids, in order, of items that arrived, changed or went since they were done: a further pass."""
        ...

    def load_chunk(self, chunk: Chunk, leave: Collection[ItemId]) -> LoadedChunk:
        """What a chunk has to do."""
        ...

    def write_chunk(self, loaded: LoadedChunk, rows: Sequence[int], vectors: NDArray[np.float32]) -> WriteReport:
        """Writes `vectors` (len(rows), dim) of the items at `rows` of the page. May be repeated."""
        ...

    def set_fence(self, fence: Fence | None) -> None:
        """From now on `fence` is called before each request that changes items; see `Store.set_fence`."""
        ...

    def publish(self) -> None:
        """Lets what was written answer queries, as far as the stage allows."""
        ...


@contextmanager
def open_transfer(project: Project, migration: Migration) -> Iterator[Transfer]:
    """The strategy of a migration, with its collections open for writing. Raises `StoreBusy`."""
    assert migration.new_encoder_id is not None
    with project.store(write=True) as source:
        if not STRATEGIES[migration.strategy].second_collection:
            undo = project.undo_log(migration)
            source.write_through(project.write_alias(migration))
            yield InPlace(source, undo, migration.new_encoder_id, lambda: project.ledger.chunks(migration.id))
            return
        assert migration.shadow is not None, "prepare names the shadow"
        with closing(source.open_collection(migration.shadow)) as target:
            yield Shadow(source, target, project.copy_log(migration), project.ledger, migration)


class InPlace:
    """Vectors are replaced where they lie, with a stamp beside each; the old ones go to the undo log first."""

    def __init__(
        self, store: Store, undo: UndoLog, stamp: str, chunks: Callable[[], Iterable[Chunk]] = lambda: ()
    ) -> None:
        self.source, self._undo, self._stamp, self._chunks = store, undo, stamp, chunks

    def everything(self) -> Iterator[ItemId]:
        """All ids, in order."""
        return iter_ids(self.source)

    def outstanding(self, leave: Collection[ItemId]) -> Iterator[ItemId]:
        """Ids of items without the stamp."""
        return (item for item in self._unstamped(None) if item not in leave)

    def _unstamped(self, after: ItemId | None, page: int = IDS) -> Iterator[ItemId]:
        while ids := self.source.unstamped(self._stamp, after=after, limit=page):
            yield from ids
            if len(ids) < page:
                return
            after = ids[-1]

    def load_chunk(self, chunk: Chunk, leave: Collection[ItemId]) -> LoadedChunk:
        """The items of a chunk, a range or a list, that do not carry the stamp."""
        before = self._undo.read(chunk)
        begun = set() if before is None else set(before.ids)
        if chunk.pass_number > 0:  # a few items of a range that may be the whole collection
            page = self.source.read(self._due(chunk, leave))
            begun.difference_update(page.ids)
            stamps = self.source.read_stamps(list(begun))
            done = [item for item, stamp in zip(stamps.ids, stamps.stamps, strict=True) if stamp == self._stamp]
            return LoadedChunk(chunk, page, repeated=done)
        if chunk.ids is None:
            page = _joined(list(pages(self.source, *bounds(chunk), size=chunk.items + 1)))
        else:
            page = self.source.read(json.loads(chunk.ids))
        carries = [stamp == self._stamp for stamp in page.stamps]
        due = [row for row, item in enumerate(page.ids) if not carries[row] and item not in leave]
        done = [item for row, item in enumerate(page.ids) if carries[row] and item in begun]
        return LoadedChunk(chunk, page if len(due) == len(page) else _rows(page, due), repeated=done)

    def _due(self, chunk: Chunk, leave: Collection[ItemId]) -> list[ItemId]:
        """Ids, in order, of the items in a chunk's range that do not carry the stamp."""
        after, up_to = bounds(chunk)
        last = order_key(up_to)
        inside = itertools.takewhile(lambda item: order_key(item) <= last, self._unstamped(after, chunk.items + 1))
        return [item for item in inside if item not in leave]

    def write_chunk(self, loaded: LoadedChunk, rows: Sequence[int], vectors: NDArray[np.float32]) -> WriteReport:
        """Makes the old vectors durable, then writes the new ones."""
        if not rows:
            return WriteReport(())
        old = _rows(loaded.page, rows)
        # Before the write: a crash between the two only repeats the chunk.
        # A repeated chunk may find what an attempt cut off has written, which bears a stamp or an adapter's write
        # intent; a vector without either is the application's, perhaps newer than what the first attempt recorded.
        external = [item for item, stamp in zip(old.ids, old.stamps, strict=True) if stamp is None]
        recorded = self._recorded_earlier(loaded.chunk, old)
        first = _rows(old, [row for row, item in enumerate(old.ids) if item not in recorded]) if recorded else old
        self._undo.record(loaded.chunk, OldVectors(first.ids, first.vectors, first.stamps), external)
        return self.source.write_vectors(old.ids, vectors, self._stamp, expected=old)

    def _recorded_earlier(self, chunk: Chunk, page: Page) -> set[ItemId]:
        """Items with a write intent of this migration, perhaps beside a new vector, whose old one an earlier pass has.

        A write of that pass was cut off, and before it was repeated the application changed the item's payload.
        """
        if chunk.pass_number == 0:
            return set()
        intended = {
            item
            for item, stamp in zip(page.ids, page.stamps, strict=True)
            if stamp is not None and stamp.startswith(self._stamp)
        }
        recorded: set[ItemId] = set()
        for earlier in self._chunks() if intended else ():
            if earlier.pass_number < chunk.pass_number and any(_inside(item, *bounds(earlier)) for item in intended):
                there = self._undo.read(earlier)
                recorded |= intended.intersection(() if there is None else there.ids)
        return recorded

    def set_fence(self, fence: Fence | None) -> None:
        """Guards the collection itself."""
        self.source.set_fence(fence)

    def publish(self) -> None:
        """New vectors may answer at once: every query comes from the new encoder."""
        self.source.publish()


class Shadow:
    """Items are copied, with their new vectors, into a collection beside the first, which is left as it is.

    A copy is due where the digest of vectors and payload in the source is not the one that the copy log has, or where
    the shadow lost it. What the application writes into the shadow itself it also writes into the source, so the same
    rule covers it.
    """

    def __init__(self, source: Store, target: Store, log: CopyLog, ledger: Ledger, migration: Migration) -> None:
        self.source, self.target = source, target
        self._log, self._ledger, self._migration = log, ledger, migration
        self._remembered: list[ItemId] | None = None

    def everything(self) -> Iterator[ItemId]:
        """All ids of the source, in order."""
        return iter_ids(self.source)

    def outstanding(self, leave: Collection[ItemId]) -> Iterator[ItemId]:
        """Ids of items whose copy is missing, out of date, or left over."""
        found: list[ItemId] = []
        self._remembered = found
        for item, _ in self._differences(None, None):
            if item not in leave:
                if len(found) <= REMEMBERED:
                    found.append(item)
                yield item
        if len(found) > REMEMBERED:
            self._remembered = None

    def load_chunk(self, chunk: Chunk, leave: Collection[ItemId]) -> LoadedChunk:
        """The items of a chunk's range whose copy is due, and the copies there that are left over."""
        after, up_to = bounds(chunk)
        if chunk.pass_number > 0 and self._remembered is not None:
            due = [item for item in self._remembered if _inside(item, after, up_to) and item not in leave]
            page = read_whole(self.source, due)
            there = set(page.ids)
            return LoadedChunk(chunk, page, surplus=[item for item in due if item not in there])
        if chunk.pass_number > 0:
            found = [(item, due) for item, due in self._differences(after, up_to) if item not in leave]
            page = read_whole(self.source, [item for item, due in found if due])
            return LoadedChunk(chunk, page, surplus=[item for item, due in found if not due])
        page = _joined(list(whole_pages(self.source, after, up_to, size=chunk.items + 1)))
        copies = {**self._log.read(chunk), **self._later()}
        there = set(iter_ids(self.target, after, up_to)) if copies else set()
        can = self.source.capabilities
        due_rows = [
            row
            for row, (item, digest) in enumerate(zip(page.ids, digests(page, can), strict=True))
            if item not in leave and (item not in there or item not in copies or copies[item].source != digest)
        ]
        surplus = there.difference(page.ids)
        return LoadedChunk(chunk, _rows(page, due_rows), surplus=[item for item in surplus if item in copies])

    def write_chunk(self, loaded: LoadedChunk, rows: Sequence[int], vectors: NDArray[np.float32]) -> WriteReport:
        """Writes the copies, reads them back, and notes what they were made from."""
        page = loaded.page
        written: Sequence[ItemId] = ()
        rejected: dict[ItemId, str] = {}
        lost: list[ItemId] = []
        if rows:
            expected = digests(page, self.source.capabilities)
            ids = [page.ids[row] for row in rows]
            # Before the write: a copy that a kill leaves unrecorded would look like the application's own.
            self._log.record(loaded.chunk, dict.fromkeys(ids, BEGUN))
            payloads = [page.payloads[row] for row in rows]
            further = None if page.further is None else [page.further[row] for row in rows]
            report = self.target.insert(Page(ids, vectors, payloads, [None] * len(ids), further))
            rejected.update(report.rejected)
            written = report.written
            back = read_whole(self.target, written)
            copied = dict(zip(back.ids, digests(back, self.target.capabilities), strict=True))
            source = {page.ids[row]: expected[row] for row in rows}
            self._log.record(loaded.chunk, {item: Copy(source[item], copied[item]) for item in copied})
            lost = [item for item in written if item not in copied]  # deleted by the application, perhaps
            rejected.update(dict.fromkeys(lost, "the store took the item and does not have it"))
            written = back.ids
        surplus = [*loaded.surplus, *lost]
        gone: list[ItemId] = []
        if surplus:
            # Read again: an item that came back must not lose its copy.
            there = set(self.source.read_stamps(surplus).ids)
            gone = [item for item in surplus if item not in there]
            self.target.delete(gone)
        return WriteReport(written, gone, {item: why for item, why in rejected.items() if item not in gone})

    def set_fence(self, fence: Fence | None) -> None:
        """Guards the shadow: nothing is written to the source."""
        self.target.set_fence(fence)

    def publish(self) -> None:
        """Before the canary nobody searches the shadow; from then on it must be whole after every run."""
        self.target.publish(final=self._migration.stage == "canary")

    # -- comparing ------------------------------------------------------------------------------------------------

    def _differences(self, after: ItemId | None, up_to: ItemId | None) -> Iterator[tuple[ItemId, bool]]:
        """Items in (after, up_to], in order: True where a copy is due, False where a copy is left over."""
        can = self.source.capabilities
        for lower, higher, copies in self.stretches(after, up_to):
            there = set(iter_ids(self.target, lower, higher))
            due: list[ItemId] = []
            for page in whole_pages(self.source, lower, higher):
                for item, digest in zip(page.ids, digests(page, can), strict=True):
                    copy = copies.get(item)
                    if copy is None or copy.source != digest or item not in there:
                        due.append(item)
                    there.discard(item)
            # What the application has put into the shadow ahead of the source is not in the log, and left alone.
            surplus = sorted((item for item in there if item in copies), key=order_key)
            yield from heapq.merge(
                ((item, True) for item in due), ((item, False) for item in surplus), key=lambda pair: order_key(pair[0])
            )

    def stretches(
        self, after: ItemId | None = None, up_to: ItemId | None = None
    ) -> Iterator[tuple[ItemId | None, ItemId | None, Copies]]:
        """(after, up_to] cut into pieces that fit into memory, with the log's entries for each."""
        later = self._later()
        lower, copies, items = after, dict(later), 0
        for chunk in self._ledger.chunks(self._migration.id):
            if chunk.pass_number > 0:
                break
            if after is not None and order_key(bounds(chunk)[1]) <= order_key(after):
                continue
            if up_to is not None and chunk.after_id is not None and order_key(bounds(chunk)[0]) >= order_key(up_to):  # type: ignore[arg-type]
                break
            copies = {**self._log.read(chunk), **copies}
            items += chunk.items
            if items >= ITEMS:
                higher = _smaller(bounds(chunk)[1], up_to)
                yield lower, higher, copies
                lower, copies, items = higher, dict(later), 0
        if up_to is None or lower is None or order_key(lower) < order_key(up_to):
            yield lower, up_to, copies

    def _later(self) -> Copies:
        """The entries of all further passes, which win over those of the first."""
        later: Copies = {}
        for chunk in self._ledger.chunks_of_later_passes(self._migration.id):
            later.update(self._log.read(chunk))
        return later


def bounds(chunk: Chunk) -> tuple[ItemId | None, ItemId]:
    """The range (after, up_to] of a chunk; it covers a chunk that is a list."""
    return None if chunk.after_id is None else json.loads(chunk.after_id), json.loads(chunk.upto_id)


def _inside(item: ItemId, after: ItemId | None, up_to: ItemId) -> bool:
    return (after is None or order_key(item) > order_key(after)) and order_key(item) <= order_key(up_to)


def _smaller(one: ItemId, other: ItemId | None) -> ItemId:
    return one if other is None else min(one, other, key=order_key)


def _joined(some: Sequence[Page]) -> Page:
    """Pages as one."""
    if len(some) == 1:
        return some[0]
    return Page(
        [item for page in some for item in page.ids],
        np.concatenate([page.vectors for page in some]),
        [payload for page in some for payload in page.payloads],
        [stamp for page in some for stamp in page.stamps],
        None if any(page.further is None for page in some) else [each for page in some for each in page.further or ()],
    )


def _rows(page: Page, rows: Sequence[int]) -> Page:
    """The part of a page at these rows."""
    return Page(
        [page.ids[row] for row in rows],
        page.vectors[list(rows)],
        [page.payloads[row] for row in rows],
        [page.stamps[row] for row in rows],
        None if page.further is None else [page.further[row] for row in rows],
    )
