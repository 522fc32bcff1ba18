"""FAISS: the user's index and Parquet files of items, which applications read with FAISS and Arrow.

Items and vectors belong together by FAISS id: the column `faiss_id` if there is one, else the item's id where the
index has an ID map, else the row number. An item's id is the column `id`, else the row number. Where files with the
exact vectors lie beside an index that keeps approximations, vectors that no migration has replaced are read from them.

How a crash or the application's own writes cannot do harm: a written vector goes to a segment file together with the
checksum of the vector that it replaces. A row of a segment is *pending* while index.faiss holds that vector,
*applied* when it holds the written one, and void when it holds a third one, which somebody else wrote later. Stamps
of published vectors are kept beside their checksums and hold while these agree. So what is true follows from the
files alone, whichever of them a killed process had reached.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import (
    Capabilities,
    CollectionInfo,
    Fence,
    Hits,
    ItemId,
    Page,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    order_key,
    same_value,
)
from migrator.adapters.faiss_changes import ABSENT, Change, Changes
from migrator.adapters.faiss_files import (
    Folder,
    Generation,
    Segment,
    Stamps,
    identity,
    make_folder,
)
from migrator.adapters.faiss_index import Index, row_checksums
from migrator.adapters.faiss_items import Items, listed, write_parquet_like
from migrator.adapters.faiss_originals import FEWEST, FITS, SAMPLE, Originals
from migrator.adapters.faiss_payload import Row, fitting, joined, take
from migrator.adapters.faiss_payload import rows as rows_of
from migrator.adapters.files import Vanished, replace_link
from migrator.adapters.vectors import as_batch, unusable

if TYPE_CHECKING:
    import filelock

T = TypeVar("T")

TRIES = 20  # a folder that is replaced again and again while we read it
STEADY = 6  # looks at the same two files that do not fit before they are refused: the second may be on its way
PAUSE = 0.05  # seconds between them: an application replaces its two files one after the other


SAME_VECTORS = "name the files that the index was built from as store.vectors, in the order of the items, or none"


def open_store(config: Mapping[str, Any], *, write: bool) -> FaissStore:
    """Opens the folder `path` of `config`, or the files `index` and `items`, and `vectors` beside either.

    For writing it takes the collection's lock; for reading it changes nothing.

    Raises `StoreRejected` if there is no collection, `StoreBusy` if another process writes it.
    """
    given = {key: value for key, value in config.items() if key != "kind" and value is not None}
    items, vectors = _texts(given.get("items")), _texts(given.get("vectors"))
    folder = given.keys() <= {"path", "vectors"} and isinstance(given.get("path"), (str, os.PathLike))
    files = (
        given.keys() <= {"index", "items", "vectors"} and isinstance(given.get("index"), (str, os.PathLike)) and items
    )
    if vectors is None or not (folder or files):
        raise StoreRejected(
            "a faiss store has the setting `path`, its folder, or `index` and `items`, its files, and `vectors` "
            f"beside either; given: {', '.join(sorted(config))}"
        )
    if folder:
        return FaissStore(Folder(given["path"], vectors=vectors), write=write)
    return FaissStore(Folder(index=given["index"], items=items or (), vectors=vectors), write=write)


def _texts(value: Any) -> list[str] | None:
    """One name or several as a list; None for what is neither."""
    values = [] if value is None else [value] if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(values, list | tuple) or not all(isinstance(one, (str, os.PathLike)) for one in values):
        return None
    return [str(one) for one in values]


class _State:
    """One generation of the folder in memory, with what was written since.

    Arrays with one entry an item are in the order of `items.ids`.
    """

    def __init__(
        self, folder: Folder, items: Items, index: Index, files: Originals | None, generation: Generation
    ) -> None:
        self.folder, self.items, self.index, self.generation = folder, items, index, generation
        self.vector_files = files
        self.originals = None if index.exact_vectors else files
        """What vectors are read from that no migration has replaced."""
        self.ids = items.ids
        self.where = _match(folder, items, index)  # position in the index
        self.rank = {item: rank for rank, item in enumerate(self.ids)}
        self.known_stamps: list[str | None] = [None]
        self.stamps = np.zeros(len(self.ids), np.int32)  # numbers in known_stamps
        self.pending = np.zeros(len(self.ids), bool)
        self.carried = np.zeros(len(self.ids), bool)
        """Vectors that only a rebuild of a quantised index has changed since the original."""
        self.replaced = np.zeros(len(self.ids), bool)
        """Vectors that the application has replaced in the index alone: their originals no longer hold."""
        self.unbalanced = False
        self.changes = Changes()
        self._written: Vectors | None = None

    @property
    def written(self) -> Vectors:
        """(n, dim) vectors not in the index yet; only rows that are `pending` mean something."""
        if self._written is None:
            self._written = np.empty((len(self.ids), self.index.dim), np.float32)  # pages untouched take no memory
        return self._written

    def ranks(self, ids: Sequence[ItemId]) -> NDArray[np.int64]:
        """Places of `ids` in the order; -1 for those that do not exist."""
        find = self.rank.get
        return np.fromiter((find(item, -1) for item in ids), np.int64, len(ids))

    def at(self, ranks: NDArray[np.int64]) -> list[ItemId]:
        """The ids at these places."""
        return [self.ids[rank] for rank in ranks.tolist()]

    def checksums(self, ranks: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Checksums of the vectors in the index."""
        return self.index.checksums[self.where[ranks]]

    def number(self, stamp: str | None) -> int:
        """The number that `stamps` uses for a stamp."""
        if stamp not in self.known_stamps:
            self.known_stamps.append(stamp)
        return self.known_stamps.index(stamp)

    def apply_stamps(self, stamps: Stamps) -> None:
        """Takes over stamps of vectors that the index still holds."""
        ranks = self.ranks(stamps.ids)
        number = {stamp: self.number(stamp) for stamp in set(stamps.stamps)}
        numbers = np.fromiter((number[stamp] for stamp in stamps.stamps), np.int32, len(ranks))
        there = ranks >= 0
        ranks, numbers, checksums = ranks[there], numbers[there], stamps.checksums[there]
        holds = checksums == self.checksums(ranks)
        self.stamps[ranks[holds]] = numbers[holds]
        self.carried[ranks[holds]] = numbers[holds] == 0
        self.unbalanced |= stamps.unbalanced

    def apply_segment(self, segment: Segment) -> None:
        """Takes over the rows of a segment that no later write of somebody else has made void."""
        if segment.vectors.shape[1] != self.index.dim:
            return  # the application went over to another dimension
        ranks = self.ranks(segment.ids)
        there = np.flatnonzero(ranks >= 0)
        ranks = ranks[there]
        present = self.checksums(ranks)
        applied = row_checksums(segment.vectors[there]) == present
        pending = ~applied & (segment.replaced[there] == present)
        self.pending[ranks[applied]] = False
        self.pending[ranks[pending]] = True
        self.written[ranks[pending]] = segment.vectors[there[pending]]
        self.stamps[ranks[applied | pending]] = self.number(segment.stamp)
        self.carried[ranks[pending]] = False

    def checksums_of(self, ids: Sequence[ItemId]) -> dict[ItemId, np.uint64]:
        """Checksums of the vectors in the index, of those ids that the files have."""
        ranks = self.ranks(ids)
        there = np.flatnonzero(ranks >= 0)
        sums = self.checksums(ranks[there])
        return {ids[row]: checksum for row, checksum in zip(there.tolist(), sums, strict=True)}

    def apply_change(self, change: Change) -> None:
        """Takes over what was inserted and removed, but for what somebody else wrote since."""
        if change.vectors is None or change.vectors.shape[1] == self.index.dim:
            self.changes.apply(change, self.checksums_of(change.ids))

    def followed_by(self, index: Index) -> _State:
        """The state in which `index` holds everything that was written."""
        following = _State(self.folder, self.items, index, self.vector_files, self.generation)
        following.known_stamps, following.stamps, following.replaced = self.known_stamps, self.stamps, self.replaced
        return following

    @cached_property
    def by_label(self) -> dict[int, ItemId]:
        """Items by FAISS id."""
        return dict(zip(self.index.labels[self.where].tolist(), self.ids, strict=True))

    def vectors(self, ranks: NDArray[np.int64]) -> Vectors:
        """(m,) -> (m, dim): what was written last, else the original, else what the index holds."""
        pending = self.pending[ranks]
        original = np.zeros(len(ranks), bool) if self.originals is None else ~pending & self._are_original(ranks)
        if pending.all():
            return self.written[ranks]
        if original.all() and self.originals is not None:
            return self.originals.vectors(self.items.rows[ranks])
        vectors = self.index.vectors(self.where[ranks])
        if original.any() and self.originals is not None:
            vectors[original] = self.originals.vectors(self.items.rows[ranks[original]])
        if pending.any():
            vectors[pending] = self.written[ranks[pending]]
        return vectors

    def _are_original(self, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
        original: NDArray[np.bool_] = (self.stamps[ranks] == 0) & ~self.replaced[ranks]
        return original

    @property
    def exact_vectors(self) -> bool:
        """Whether vectors come back bit for bit: from the index, or from the files beside it."""
        if self.index.exact_vectors:
            return True
        return self.originals is not None and bool((self.pending | self._are_original(np.arange(len(self.ids)))).all())

    def originals_fit(self) -> bool:
        """Whether the files of vectors hold those of the index in the order of the items, by a sample.

        Of what the application or a migration has replaced nothing can be told.
        """
        if self.vector_files is None:
            return True
        ranks = np.flatnonzero(self._are_original(np.arange(len(self.ids))) & ~self.pending)
        ranks = np.random.default_rng(0).choice(ranks, min(SAMPLE, len(ranks)), replace=False)
        if len(ranks) < FEWEST:
            return True
        kept = _directions(self.index.vectors(self.where[ranks]))
        exact = _directions(self.vector_files.vectors(self.items.rows[ranks]))
        own, others = (np.einsum("nd,nd->n", kept, some) for some in (exact, np.roll(exact, 1, axis=0)))
        return bool(np.mean(own >= others) >= FITS)

    def note_replaced(self, before: _State) -> None:
        """Learns from the state before which vectors the application has replaced in the index alone."""
        if self.originals is None or before.generation[1:] != self.generation[1:] or before.index.dim != self.index.dim:
            return
        everything = np.arange(len(self.ids))
        untouched = (before.stamps == 0) & (self.stamps == 0) & ~self.carried
        self.replaced = before.replaced | (untouched & (before.checksums(everything) != self.checksums(everything)))

    def all_after(self, item: ItemId | None) -> Iterator[ItemId]:
        """Ids beyond `item`, in order, with what was inserted and removed."""
        changed = self.changes.by_id
        plain = (self.ids[rank] for rank in range(self.after(item), len(self.ids)) if self.ids[rank] not in changed)
        return heapq.merge(plain, self.changes.after(item), key=order_key)

    def after(self, item: ItemId | None) -> int:
        """The first place beyond `item`."""
        return 0 if item is None else bisect.bisect_right(self.ids, order_key(item), key=order_key)


def _match(folder: Folder, items: Items, index: Index) -> NDArray[np.int64]:
    """(n,) position in the index of each item. Raises `StoreRejected` unless they match one to one."""
    n = len(items.ids)
    if n != index.count:
        raise StoreRejected(
            f"{folder.items} holds {n} items, but {folder.index} {index.count} vectors: they must be of one generation"
        )
    if items.faiss_ids is not None:
        labels, column = items.faiss_ids, "faiss_id"
    elif index.has_id_map and not items.numbered:
        if n and isinstance(items.ids[0], str):
            raise StoreRejected(
                f"{folder.index} has an ID map, but the ids in {folder.items} are strings: add an integer column "
                "`faiss_id` with the id of each item in the index"
            )
        labels, column = np.array(items.ids, np.int64), "id"
    else:
        labels, column = items.rows, "row number"
    order = np.argsort(index.labels)
    ordered = index.labels[order]
    found = np.minimum(np.searchsorted(ordered, labels), max(n - 1, 0))
    missing = np.flatnonzero(ordered[found] != labels)
    if len(missing):
        hint = ": add an integer column `faiss_id`" if column == "row number" else ""
        raise StoreRejected(
            f"{folder.items} names the FAISS id {labels[missing[0]]} ({column}), "
            f"which {folder.index} does not hold{hint}"
        )
    if len(np.unique(labels)) < n:
        values, counts = np.unique(labels, return_counts=True)
        raise StoreRejected(f"{folder.items} names the FAISS id {values[counts > 1][0]} more than once: must be unique")
    return order[found]


class FaissStore:
    """A collection in a FAISS folder. One thread may read while another writes."""

    def __init__(self, folder: Folder, *, write: bool) -> None:
        self._folder = folder
        self._lock = threading.RLock()  # over the state in memory; never held during a write to the disk
        self._writing = threading.Lock()  # one write or publication at a time
        self._held: filelock.BaseFileLock | None = None
        self._open = True
        self._check_there()
        if write:
            self._held = folder.lock()
        try:
            self._state = self._load()
            self._first_items = self._state.generation.of_items
        except BaseException:
            self.close()
            raise

    # -- loading --------------------------------------------------------------------------------------------------

    def _load(self) -> _State:
        """The folder as it is, all files of one generation."""
        seen: list[Generation] = []
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            generation = self._folder.identity()
            seen.append(generation)
            try:
                state = self._read(generation)
            except (StoreRejected, Vanished):
                if self._folder.identity() == generation and seen.count(generation) >= STEADY:
                    raise
                continue
            if self._folder.identity() == generation:
                return state
        raise StoreUnavailable(f"{self._folder.collection_id} is being replaced all the time: try again when it rests")

    def _read(self, generation: Generation) -> _State:
        folder = self._folder
        problems: list[str] = []
        items = _attempt(problems, folder.read_items)
        index = _attempt(problems, lambda: folder.read_index(folder.live(folder.index)))
        originals = _attempt(problems, folder.read_originals)
        if originals is not None:
            problems += _unlike(folder, originals, items, index)
        state = None
        if items is not None and index is not None:
            state = _attempt(problems, lambda: _State(folder, items, index, originals, generation))
        if state is None or problems:
            raise StoreRejected(listed(problems))
        for file in folder.stamp_files():
            state.apply_stamps(folder.read_stamps(file))
        for file in folder.segment_files():
            state.apply_segment(folder.read_segment(file))
        for file in folder.change_files():
            state.apply_change(folder.read_change(file))
        if not state.originals_fit():
            raise StoreRejected(
                f"{originals} hold other vectors than {folder.index}, or in another order: {SAME_VECTORS}"
            )
        return state

    def _check_there(self) -> None:
        """Raises `StoreRejected` with all that is wrong where one of the user's files is not there."""
        folder = self._folder
        problems = folder.missing()
        if problems:
            if folder.index.is_file():
                _attempt(problems, lambda: folder.read_index(folder.index))
            if folder.item_files():
                _attempt(problems, folder.read_items)
            _attempt(problems, folder.read_originals)
            raise StoreRejected(listed(problems))

    def _current(self) -> _State:
        """The state in memory, after a look whether the application has replaced a file. Call with `_lock` held."""
        if not self._open:
            raise StoreRejected(f"{self._folder.collection_id} was closed")
        if self._folder.identity() != self._state.generation:
            try:
                following = self._load()
                following.note_replaced(self._state)
                self._state = following
            except StoreRejected as error:
                # Half of a replacement, perhaps: the application changes its two files one after the other.
                raise StoreUnavailable(f"{error} (it was replaced while open)") from error
        return self._state

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What this kind of index allows."""
        with self._lock:
            state = self._current()
            index, outdated = state.index, self._folder.vectors_outdated()
        return Capabilities(
            update_in_place=index.updates_in_place,
            visible="on_publish" if index.updates_in_place else "at_cutover",
            stamps=True,
            concurrent_writers=False,
            exact_vectors=state.exact_vectors,
            normalises=index.normalises,
            partial_update=True,
            aliases=self._folder.is_folder,
            notes=tuple(_notes(state, outdated=outdated)),
        )

    def describe(self) -> CollectionInfo:
        """Facts of the folder as it is now."""
        import faiss

        with self._lock:
            state = self._current()
        index = state.index
        return CollectionInfo(
            name=f"faiss:{self._folder.collection_id}",
            collection_id=self._folder.collection_id,
            alias=self._folder.alias,
            dim=index.dim,
            metric=index.metric,
            count=self.count(),
            index=index.description,
            server=f"faiss {faiss.__version__}",
            schema={field.name: str(field.type) for field in state.items.payload.schema},
            bytes_on_disk=state.generation.of_index[2],
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` ids beyond `after` and not beyond `up_to`: integers ascending, or strings by code point."""
        with self._lock:
            state = self._current()
            if not state.changes:
                end = len(state.ids) if up_to is None else state.after(up_to)
                start = state.after(after)
                return list(state.ids[start : min(end, start + max(limit, 0))])
            last = None if up_to is None else order_key(up_to)
            ids = itertools.takewhile(lambda item: last is None or order_key(item) <= last, state.all_after(after))
            return list(itertools.islice(ids, max(limit, 0)))

    def read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Page:
        """Items with what was written last, published or not."""
        with self._lock:
            state = self._current()
            staged = state.changes.by_id
            there = [item for item in ids if (staged[item] is not None if item in staged else item in state.rank)]
            plain = [item for item in there if item not in staged]
            ranks = state.ranks(plain)
            found = state.vectors(ranks) if vectors else None
            stamps = [state.known_stamps[number] for number in state.stamps[ranks].tolist()]
            payloads = rows_of(state.items.payload, state.items.rows[ranks]) if payload else None
        if len(plain) == len(there):
            return Page(there, found, payloads, stamps)
        place = {item: row for row, item in enumerate(plain)}
        mixed = [(place.get(item, -1), staged.get(item)) for item in there]
        return Page(
            there,
            None
            if found is None
            else np.array(
                [found[row] if changed is None else changed.vector for row, changed in mixed], np.float32
            ).reshape(len(there), state.index.dim),
            None
            if payloads is None
            else [payloads[row] if changed is None else changed.payload for row, changed in mixed],
            [stamps[row] if changed is None else changed.stamp for row, changed in mixed],
        )

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` items, as `read` gives them."""
        with self._lock:
            return self.read(self.scan_ids(after=after, up_to=up_to, limit=limit), vectors=True, payload=True)

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids beyond `after` of items whose last written vector does not carry `stamp`."""
        with self._lock:
            state = self._current()
            number = state.number(stamp)
            found: list[ItemId] = []
            if state.changes:
                staged = state.changes.by_id
                for item in state.all_after(after):
                    if len(found) >= limit:
                        break
                    changed = staged.get(item)
                    if (changed.stamp if changed else state.known_stamps[state.stamps[state.rank[item]]]) != stamp:
                        found.append(item)
                return found
            start, block = state.after(after), max(4096, 2 * limit)
            while len(found) < limit and start < len(state.ids):
                ranks = start + np.flatnonzero(state.stamps[start : start + block] != number)
                found += state.at(ranks[: limit - len(found)])
                start += block
        return found

    def count(self, *, stamp: str | None = None) -> int:
        """Number of items; with `stamp`, of those whose last written vector carries it."""
        with self._lock:
            state = self._current()
            changed = state.ranks(list(state.changes.by_id))
            changed = changed[changed >= 0]
            staged = [item.stamp for _, item in state.changes.staged()]
            if stamp is None:
                return len(state.ids) - len(changed) + len(staged)
            carries = state.stamps == state.number(stamp)
            return int(np.count_nonzero(carries)) - int(np.count_nonzero(carries[changed])) + staged.count(stamp)

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """`n` distinct ids in random order."""
        with self._lock:
            state = self._current()
            ids = list(state.all_after(None)) if state.changes else state.ids
        chosen = np.random.default_rng(seed).choice(len(ids), size=min(max(n, 0), len(ids)), replace=False)
        return [ids[place] for place in chosen.tolist()]

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest published items to each of `vectors` (n, dim). `exact` compares with all of them."""
        with self._lock:
            state = self._current()
            queries = as_batch(vectors, state.index.dim)
            if k < 1 or not np.isfinite(queries).all():
                raise StoreRejected(f"a search needs finite vectors and at least one answer, k is {k}")
            scores, labels = state.index.search(queries, k, exact=exact)
        ids: list[list[ItemId]] = []
        kept: list[list[float]] = []
        for row_scores, row_labels in zip(scores, labels, strict=True):
            answered = row_labels != -1
            ids.append([state.by_label[label] for label in row_labels[answered].tolist()])
            kept.append(row_scores[answered].tolist())
        return Hits(ids, kept)

    def approximations(self, vectors: Vectors) -> Vectors:
        """(n, dim) -> (n, dim): what the index would give back of `vectors`, as it is trained now."""
        with self._lock:
            index = self._current().index
            return index.approximations(as_batch(vectors, index.dim))

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Makes `vectors` (n, dim) durable in a segment; `publish` brings them into the index.

        With a stamp, vectors that are not finite or all zeros are `rejected`. Without one they are taken: it may be
        what lay there before.
        """
        with self._writing:
            self._must_write()
            with self._lock:
                state = self._current()
                vectors = state.index.as_kept(as_batch(vectors, state.index.dim, ids))
                rejected = {} if stamp is None else unusable(ids, vectors)
                now = self.read(ids, vectors=expected is not None, payload=self._items_replaced(state))
                there = set(now.ids)
                rejected = {item: why for item, why in rejected.items() if item in there}
                changed = [] if expected is None else _changed(expected, now)
                if changed and stamp is not None:
                    changed = _not_ours(changed, now, ids, vectors, stamp)
                leave = {*rejected, *changed}
                rows = [row for row, item in enumerate(ids) if item in there and item not in leave]
                written = [ids[row] for row in rows]
                staged = [row for row in rows if ids[row] in state.changes.by_id]
                plain = [row for row in rows if ids[row] not in state.changes.by_id]
                replaced = state.checksums(state.ranks([ids[row] for row in plain]))
            if plain:
                segment = Segment([ids[row] for row in plain], vectors[plain], stamp, replaced)
                self._folder.write_segment(segment)
                with self._lock:
                    self._state.apply_segment(segment)
            if staged:
                again = self.read([ids[row] for row in staged], vectors=False, payload=True)
                self._insert(Page(again.ids, vectors[staged], again.payloads, [stamp] * len(staged)))
        return WriteReport(written, [item for item in ids if item not in there], rejected, changed)

    def _items_replaced(self, state: _State) -> bool:
        """Whether payloads may have changed since this store was opened."""
        return state.generation.of_items != self._first_items

    def insert(self, page: Page) -> WriteReport:
        """Makes whole items durable beside the two files; `publish(final=True)` brings them in."""
        with self._writing:
            self._must_write()
            return self._insert(page)

    def _insert(self, page: Page) -> WriteReport:
        assert page.vectors is not None
        assert page.payloads is not None
        with self._lock:
            state = self._current()
            vectors = state.index.as_kept(as_batch(page.vectors, state.index.dim, page.ids))
            rejected = unusable(page.ids, vectors)
            strings = state.items.strings
            rejected.update(
                {
                    item: f"ids here are {'strings' if strings else 'integers'}"
                    for item in page.ids
                    if isinstance(item, str) != strings
                }
            )
            payload, wrong = fitting(page.payloads, state.items.payload.schema)
            rejected.update({page.ids[row]: why for row, why in wrong.items()})
            rows = [row for row, item in enumerate(page.ids) if item not in rejected]
            ids = [page.ids[row] for row in rows]
            change = Change(
                ids, self._replaced(state, ids), vectors[rows], take(payload, rows), [page.stamps[row] for row in rows]
            )
        if ids:
            self._folder.write_change(change)
            with self._lock:
                self._state.apply_change(change)
        return WriteReport(ids, (), rejected)

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Makes removals durable beside the two files; `publish(final=True)` carries them out."""
        with self._writing:
            self._must_write()
            with self._lock:
                state = self._current()
                there = list(self.read(ids, vectors=False, payload=False).ids)
                change = Change(there, self._replaced(state, there))
            if there:
                self._folder.write_change(change)
                with self._lock:
                    self._state.apply_change(change)

    @staticmethod
    def _replaced(state: _State, ids: Sequence[ItemId]) -> NDArray[np.uint64]:
        present = state.checksums_of(ids)
        return np.array([present.get(item, ABSENT) for item in ids], np.uint64)

    def set_fence(self, fence: Fence | None) -> None:
        """Nothing: the lock is the fence."""

    def create_write_alias(self, alias: str) -> None:
        """Nothing: the lock is the fence."""

    def delete_write_alias(self, alias: str) -> None:
        """Nothing: the lock is the fence."""

    def write_through(self, alias: str) -> None:
        """Nothing: the lock is the fence."""

    def publish(self, *, final: bool = False) -> None:
        """Replaces index.faiss by one that holds what was written. Indexes that need a rebuild get it with `final`.

        Raises `StoreUnavailable`, with index.faiss as it was, if the disk does not take the new one.
        """
        with self._writing:
            self._must_write()
            for _ in range(TRIES):
                with self._lock:
                    state = self._current()
                if self._merge(state) if final and state.changes else self._publish(state, final):
                    return
        raise StoreUnavailable(f"{self._folder.index} is being replaced all the time: try again when it rests")

    def _publish(self, state: _State, final: bool) -> bool:
        """One attempt; False if the application replaced a file meanwhile."""
        folder = self._folder
        if not (state.index.updates_in_place or final):
            return True
        old_files = [*folder.stamp_files(), *folder.segment_files()]
        if not (state.pending.any() or (final and state.unbalanced)):
            if folder.segment_files():
                self._write_stamps(state)
                folder.remove(old_files)
            return True
        if not folder.original.exists():
            folder.keep_original()
        following, write = self._following(state, final)
        if folder.identity() != state.generation:
            return False
        ready = folder.prepare(write)
        try:
            following.generation = state.generation._replace(of_index=identity(ready.stat()))
            # The stamps come first: until the rename they fit no vector that they should not.
            stamps = self._write_stamps(following)
            with self._lock:
                if folder.identity() != state.generation:
                    folder.remove(stamps)
                    return False
                folder.replace_index(ready)
                self._state = following
        finally:
            ready.unlink(missing_ok=True)
        if not (following.stamps.any() or following.unbalanced):
            old_files.append(folder.original)  # nothing of a migration is left to be taken back
        # Oldest first: an older row must never outlive the newer one that took it back.
        folder.remove(old_files)
        return True

    def _merge(self, state: _State) -> bool:
        """One attempt at bringing inserted and removed items into the two files; False if one was replaced."""
        folder = self._folder
        old_files = [*folder.stamp_files(), *folder.segment_files(), *folder.change_files()]
        merged = _Merged(state)
        vectors, labels, stamps = merged.vectors, merged.labels, merged.stamps
        index = folder.read_index(folder.index)
        index.fill(vectors, labels)
        ready = folder.prepare(index.write)
        try:
            # Of vectors that the files do not hold yet: until they do, these stamps fit nothing.
            self._write_merged_stamps(stamps, vectors, labels, index)
            with self._lock:
                if folder.identity() != state.generation:
                    return False
                folder.replace_files(ready, merged.files())
                folder.remove(old_files)
                self._state = self._load()
                self._first_items = self._state.generation.of_items
        finally:
            ready.unlink(missing_ok=True)
        return True

    def _write_merged_stamps(
        self, stamps: Mapping[int, tuple[ItemId, str]], vectors: Vectors, labels: NDArray[np.int64], index: Index
    ) -> None:
        if not stamps:
            return
        rows = np.array(list(stamps), np.int64)
        kept = vectors[rows]
        if not index.exact_vectors or index.normalises:
            filled = index.reread()
            order = np.argsort(filled.labels)
            kept = filled.vectors(order[np.searchsorted(filled.labels[order], labels[rows])])
        self._folder.write_stamps(
            Stamps(
                [item for item, _ in stamps.values()],
                [stamp for _, stamp in stamps.values()],
                row_checksums(kept),
                False,
            )
        )

    def _following(self, state: _State, final: bool) -> tuple[_State, Callable[[Callable[[bytes], object]], object]]:
        """The generation after `state`, and what writes its index file."""
        folder, index = self._folder, state.index
        everything = np.arange(len(state.ids))
        same = np.zeros(len(state.ids), bool)
        if final:
            original = folder.read_index(folder.original)
            same = _same(state, original)
            if len(same) and same.all():  # everything was taken back
                return state.followed_by(original), folder.copy_original
            del original  # as large as the next one
        copy = folder.read_index(folder.index)
        if folder.identity() != state.generation:
            return state, copy.write
        if index.updates_in_place and not (final and index.goes_out_of_balance):
            changed = np.flatnonzero(state.pending)
            copy.replace(state.where[changed], state.written[changed])
        else:
            vectors = np.empty((len(state.ids), index.dim), np.float32)
            vectors[state.where] = state.vectors(everything)
            copy.rebuild(vectors)
        following = state.followed_by(copy)
        following.unbalanced = index.goes_out_of_balance and not final
        if not index.exact_vectors and following.stamps.any():
            following.carried = same
        return following, copy.write

    def _write_stamps(self, state: _State) -> list[Path]:
        """Writes down which stamps hold for the vectors in `state.index`; returns the file, if there is one."""
        ranks = np.flatnonzero((state.stamps > 0) | state.carried)
        if not (len(ranks) or state.unbalanced):
            return []
        stamps = Stamps(
            state.at(ranks),
            [state.known_stamps[number] for number in state.stamps[ranks].tolist()],
            state.checksums(ranks),
            state.unbalanced,
        )
        return [self._folder.write_stamps(stamps)]

    def clear_migration_state(self) -> None:
        """Removes stamps, folded segments and the original index. Refused while written vectors wait for `publish`."""
        with self._writing:
            self._must_write()
            with self._lock:
                state = self._current()
                waiting = int(state.pending.sum()) + len(state.changes.by_id)
                if waiting:
                    raise StoreRejected(
                        f"{self._folder.collection_id}: {waiting} written vectors are not published: publish them, or "
                        "restore the old ones, before the state of the migration is cleared"
                    )
                folder = self._folder
                if state.vector_files is not None and state.stamps.any():
                    folder.mark_vectors_outdated()
                    state.originals = state.vector_files = None
                folder.remove([*folder.stamp_files(), *folder.segment_files(), folder.original])
                state.stamps[:] = 0
                state.carried[:] = False
                state.unbalanced = False

    # -- a second collection ----------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether there is a folder of that path with an index in it, or this collection is called so."""
        with self._lock:
            self._current()
        if collection_id == self._folder.collection_id:
            return self._folder.index.is_file()
        return Path(collection_id, "index.faiss").is_file() and not Path(collection_id).is_symlink()

    def open_collection(self, collection_id: str) -> FaissStore:
        """The collection in another folder, or this one once more."""
        with self._lock:
            self._current()
        return FaissStore(self._folder.opened_as(collection_id), write=self._held is not None)

    def create_like(self, collection_id: str, *, dim: int) -> FaissStore:
        """A new folder with an empty index of the same kind and parameters, and the same columns."""
        self._must_write()
        path = Path(collection_id)
        if path.exists():
            store = FaissStore(Folder(path), write=True)
            if not store._folder.created.exists():
                store.close()
                raise StoreRejected(f"{path} is there already and was not made by migrator: remove it, or plan again")
            if store.describe().dim != dim:
                store.close()
                raise StoreRejected(f"{path} is there already, for vectors of another dimension than {dim}: remove it")
            return store
        with self._lock:
            state = self._current()
        make_folder(path, state.index.like(dim), state.items.empty_table())
        return FaissStore(Folder(path), write=True)

    def check_create_like(self, *, dim: int) -> None:
        """Refuses an index of which no empty one can be made."""
        with self._lock:
            self._current().index.like(dim)

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Replaces the symbolic link `alias` by one to the folder `to`."""
        self._must_write()
        link = Path(alias)
        if not link.is_symlink():
            raise StoreRejected(f"{link} is no symbolic link that could be pointed at {to}")
        if not self.exists(to):
            raise StoreRejected(f"{to} holds no collection to point {link} at")
        replace_link(link, Path(to))

    def drop(self) -> None:
        """Deletes the two files and `.migrator/`, and the folder if nothing else lies in it."""
        with self._writing:
            self._must_write()
            folder = self._folder
            named = Path(folder.collection_id)
            for link in named.parent.iterdir():
                if link != named and link.is_symlink() and link.resolve() == named:
                    raise StoreRejected(f"{named} is not deleted: the symbolic link {link} leads to it")
        self.close()
        folder.delete()

    def _must_write(self) -> None:
        if not self._open:
            raise StoreRejected(f"{self._folder.collection_id} was closed")
        if self._held is None:
            raise StoreRejected(f"{self._folder.collection_id} was opened for reading only")

    def close(self) -> None:
        """Releases the folder. Safe to repeat."""
        with self._writing:
            self._open = False
            if self._held is not None:
                self._folder.remove_empty_folders()
                self._held.release()
                self._held = None


def _notes(state: _State, *, outdated: bool) -> Iterator[str]:
    """What follows from the kind of index, for the plan. `outdated`: the files of store.vectors are too old."""
    index = state.index
    if index.goes_out_of_balance:
        yield (
            f"{index.name}: replaced vectors crowd into few lists, which makes searches slower or less complete; "
            "the index is trained again at the cutover"
        )
    if not index.updates_in_place:
        yield (
            f"{index.name} cannot be changed in place: new vectors wait beside it, and it is rebuilt with the same "
            "parameters at the cutover; until then searches find the old vectors"
        )
    if index.kept_as_trained:
        yield (
            f"FAISS cannot train the {' and the '.join(index.kept_as_trained)} of {index.name} again: a rebuild keeps "
            "it as it was trained on the old vectors, and searches may find less than in an index built from the start"
        )
    if index.exact_vectors:
        return
    kept = f"{index.name} keeps approximations: vectors read from it differ from those that were added"
    if outdated:
        yield f"{kept}; the files of store.vectors are older than the last migration and not used: remove the key"
    elif state.originals is None:
        yield f"{kept}; where you have the exact ones as .npy files, name them as store.vectors"
    else:
        yield f"{index.name} keeps approximations; old vectors are read from the files of store.vectors"


def _same(state: _State, original: Index) -> NDArray[np.bool_]:
    """(n,) which items have, by what was written last, the vector that the original index holds for them."""
    try:
        where = _match(state.folder, state.items, original)
    except StoreRejected:  # items came or went since
        return np.zeros(len(state.ids), bool)
    checksums = state.checksums(np.arange(len(state.ids)))
    pending = np.flatnonzero(state.pending)
    checksums[pending] = row_checksums(state.written[pending])
    same: NDArray[np.bool_] = state.carried | (checksums == original.checksums[where])
    if state.originals is not None:  # the undo log has these, not what the index makes of them
        exact = row_checksums(state.originals.vectors(state.items.rows[pending]))
        same[pending] |= checksums[pending] == exact
    return same


def _changed(expected: Page, now: Page) -> list[ItemId]:
    """Items whose vector, or payload where it is given, is another than it was."""
    assert expected.vectors is not None
    assert now.vectors is not None
    before = dict(zip(expected.ids, row_checksums(expected.vectors).tolist(), strict=True))
    after = zip(now.ids, row_checksums(now.vectors).tolist(), strict=True)
    changed = {item for item, checksum in after if before.get(item) != checksum}
    if now.payloads is not None and expected.payloads is not None:
        payloads = dict(zip(expected.ids, expected.payloads, strict=True))
        changed |= {
            item
            for item, fields in zip(now.ids, now.payloads, strict=True)
            if not same_value(payloads.get(item), fields)
        }
    return [item for item in now.ids if item in changed]


def _not_ours(changed: list[ItemId], now: Page, ids: Sequence[ItemId], vectors: Vectors, stamp: str) -> list[ItemId]:
    """Those of `changed` that do not bear `vectors` and `stamp` already, from this very call, repeated."""
    assert now.vectors is not None
    row, place = {item: row for row, item in enumerate(ids)}, {item: at for at, item in enumerate(now.ids)}
    return [
        item
        for item in changed
        if now.stamps[place[item]] != stamp or now.vectors[place[item]].tobytes() != vectors[row[item]].tobytes()
    ]


class _Merged:
    """All items with what was inserted and removed, row by row. Those that stay keep their order, what is new follows.

    vectors (m, dim), FAISS ids (m,), and stamps where there are, by row.
    """

    def __init__(self, state: _State) -> None:
        items, staged = state.items, state.changes.by_id
        self._state = state
        by_row = np.argsort(items.rows)  # rank of each row
        kept = np.array([rank for rank in by_row if staged.get(state.ids[rank], True) is not None], np.int64)
        new = [item for item, _ in state.changes.staged() if item not in state.rank]
        self.ids = [*(state.ids[rank] for rank in kept), *new]
        self._rows = items.rows[kept]  # ascending
        self.vectors = np.empty((len(self.ids), state.index.dim), np.float32)
        self.vectors[: len(kept)] = state.vectors(kept)
        self.stamps: dict[int, tuple[ItemId, str]] = {}
        self._changed: dict[int, Row] = {}
        for row, item in enumerate(self.ids):
            changed = staged.get(item)
            if changed is not None:
                self.vectors[row] = changed.vector
                self._changed[row] = changed.payload
            stamp = changed.stamp if changed is not None else state.known_stamps[state.stamps[kept[row]]]
            if stamp is not None:
                self.stamps[row] = (item, stamp)
        rows = np.arange(len(self.ids))
        self._with_ids = items.numbered and self.ids != rows.tolist()
        """The row numbers are not the ids any more."""
        if items.faiss_ids is not None:
            first = int(items.faiss_ids.max(initial=-1)) + 1
            self.labels = np.concatenate([items.faiss_ids[kept], np.arange(first, first + len(new))]).astype(np.int64)
        elif state.index.has_id_map:
            self.labels = np.array(self.ids, np.int64)
        else:
            self.labels = rows

    def files(self) -> dict[Path, Callable[[IO[bytes]], object]]:
        """The user's files that are to be another, with what writes each."""
        items, schema = self._state.items, self._state.items.payload.schema
        changed, _ = fitting(list(self._changed.values()), schema)
        places = np.concatenate([self._rows, np.zeros(len(self.ids) - len(self._rows), np.int64)])
        places[list(self._changed)] = len(items.payload) + np.arange(len(self._changed))
        payload = take(joined([items.payload, changed], schema), places) if schema.names else items.payload
        written: dict[Path, Callable[[IO[bytes]], object]] = {}
        for file, part in zip(items.files, self._parts([file.count for file in items.files]), strict=True):
            if self._with_ids or self._differs(part, file.count):
                table = items.file_table(
                    file, self.ids[part], self.labels[part], payload.slice(part.start, part.stop - part.start),
                    with_ids=self._with_ids,
                )  # fmt: skip
                written[file.path] = partial(write_parquet_like, file.path, table)
        originals = self._state.vector_files
        if originals is not None:
            sizes = [len(file.array) for file in originals.files]
            for original, part in zip(originals.files, self._parts(sizes), strict=True):
                if self._differs(part, len(original.array)):
                    written[original.path] = partial(original.write, self.vectors[part])
        return written

    def _parts(self, sizes: Sequence[int]) -> list[slice]:
        """The rows that belong into each of the user's files: those that were there; what is new, into the last."""
        stops = np.searchsorted(self._rows, np.cumsum(sizes)).tolist()
        stops[-1] = len(self.ids)
        return [slice(start, stop) for start, stop in itertools.pairwise([0, *stops])]

    def _differs(self, part: slice, count: int) -> bool:
        return part.stop - part.start != count or any(part.start <= row < part.stop for row in self._changed)


def _attempt(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives; None, and a problem more, where it is refused."""
    try:
        return read()
    except StoreRejected as error:
        problems.append(str(error))
        return None


def _unlike(folder: Folder, originals: Originals, items: Items | None, index: Index | None) -> list[str]:
    """How files of vectors differ in number or length from what they should be the vectors of."""
    problems = []
    if items is not None and originals.count != len(items.ids):
        problems.append(f"{originals} hold {originals.count} vectors, but {folder.items} {len(items.ids)} items")
    elif index is not None and originals.count != index.count:
        problems.append(f"{originals} hold {originals.count} vectors, but {folder.index} {index.count}")
    if index is not None and originals.dim != index.dim:
        problems.append(f"{originals} hold {originals.dim}-d vectors, but {folder.index} {index.dim}-d ones")
    return [f"{problem}: {SAME_VECTORS}" for problem in problems]


def _directions(vectors: Vectors) -> Vectors:
    """Vectors at unit length; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
