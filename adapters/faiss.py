"""FAISS: a folder with the user's `index.faiss` and `items.parquet`, which applications read with FAISS and Arrow.

Items and vectors belong together by FAISS id: the column `faiss_id` if there is one, else the column `id` where the
index has an ID map, else the row number.

How a crash or the application's own writes cannot do harm: a written vector goes to a segment file together with the
checksum of the vector that it replaces. A row of a segment is *pending* while index.faiss holds that vector,
*applied* when it holds the written one, and void when it holds a third one, which somebody else wrote later. Stamps
of published vectors are kept beside their checksums and hold while these agree. So what is true follows from the
files alone, whichever of them a killed process had reached.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import (
    Capabilities,
    CollectionInfo,
    Hits,
    ItemId,
    Page,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    order_key,
)
from adapters.faiss_files import Folder, Identity, Items, Segment, Stamps, Vanished, identity
from adapters.faiss_index import Index, row_checksums

if TYPE_CHECKING:
    import filelock

TRIES = 20  # a folder that is replaced again and again while we read it
PAUSE = 0.05  # seconds between them: an application replaces its two files one after the other


def open_store(config: Mapping[str, Any], *, write: bool) -> FaissStore:
    """Opens the folder `config["path"]`. For writing it takes the folder's lock; for reading it changes nothing.

    Raises `StoreRejected` if the folder does not hold a collection, `StoreBusy` if another process writes it.
    """
    unknown = sorted(set(config) - {"kind", "path"})
    if unknown or not isinstance(config.get("path"), (str, os.PathLike)):
        raise StoreRejected(f"a faiss store has one setting, its folder `path`; given: {', '.join(sorted(config))}")
    return FaissStore(Folder(config["path"]), write=write)


class _State:
    """One generation of the folder in memory, with what was written since.

    Arrays with one entry an item are in the order of `items.ids`.
    """

    def __init__(self, folder: Folder, items: Items, index: Index, generation: tuple[Identity, Identity]) -> None:
        self.folder, self.items, self.index, self.generation = folder, items, index, generation
        self.ids = items.ids
        self.where = _match(folder, items, index)  # position in the index
        self.rank = {item: rank for rank, item in enumerate(self.ids)}
        self.known_stamps: list[str | None] = [None]
        self.stamps = np.zeros(len(self.ids), np.int32)  # numbers in known_stamps
        self.pending = np.zeros(len(self.ids), bool)
        self.carried = np.zeros(len(self.ids), bool)
        """Vectors that only a rebuild of a quantised index has changed since the original."""
        self.unbalanced = False
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

    def followed_by(self, index: Index) -> _State:
        """The state in which `index` holds everything that was written."""
        following = _State(self.folder, self.items, index, self.generation)
        following.known_stamps, following.stamps = self.known_stamps, self.stamps
        return following

    @cached_property
    def by_label(self) -> dict[int, ItemId]:
        """Items by FAISS id."""
        return dict(zip(self.index.labels[self.where].tolist(), self.ids, strict=True))

    def vectors(self, ranks: NDArray[np.int64]) -> Vectors:
        """(m,) -> (m, dim): what was written last, else what the index holds."""
        pending = self.pending[ranks]
        if pending.all():
            return self.written[ranks]
        vectors = self.index.vectors(self.where[ranks])
        if pending.any():
            vectors[pending] = self.written[ranks[pending]]
        return vectors

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
    elif index.has_id_map:
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
        if write:
            self._held = folder.lock()
        try:
            self._state = self._load()
        except BaseException:
            self.close()
            raise

    # -- loading --------------------------------------------------------------------------------------------------

    def _load(self) -> _State:
        """The folder as it is, all files of one generation."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            generation = self._folder.identity()
            try:
                state = self._read(generation)
            except (StoreRejected, Vanished):
                if self._folder.identity() == generation and attempt:
                    raise
                continue
            if self._folder.identity() == generation:
                return state
        raise StoreUnavailable(f"{self._folder.path} is being replaced all the time: try again when it rests")

    def _read(self, generation: tuple[Identity, Identity]) -> _State:
        folder = self._folder
        state = _State(folder, folder.read_items(), folder.read_index(folder.index), generation)
        for file in folder.stamp_files():
            state.apply_stamps(folder.read_stamps(file))
        for file in folder.segment_files():
            state.apply_segment(folder.read_segment(file))
        return state

    def _current(self) -> _State:
        """The state in memory, after a look whether the application has replaced a file. Call with `_lock` held."""
        if not self._open:
            raise StoreRejected(f"{self._folder.path} was closed")
        if self._folder.identity() != self._state.generation:
            try:
                self._state = self._load()
            except StoreRejected as error:
                # Half of a replacement, perhaps: the application changes its two files one after the other.
                raise StoreUnavailable(f"{error} (it was replaced while open)") from error
        return self._state

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What this kind of index allows."""
        with self._lock:
            index = self._current().index
        notes = []
        if index.goes_out_of_balance:
            notes.append(
                f"{index.name}: replaced vectors crowd into few lists, which makes searches slower or less complete; "
                "the index is trained anew at the cutover"
            )
        if not index.updates_in_place:
            notes.append(
                f"{index.name} cannot be changed in place: new vectors wait beside it, and it is rebuilt with the same "
                "parameters at the cutover; until then searches find the old vectors"
            )
        if not index.exact_vectors:
            notes.append(f"{index.name} keeps approximations: vectors read from it differ from those that were added")
        return Capabilities(
            update_in_place=index.updates_in_place,
            visible="on_publish" if index.updates_in_place else "at_cutover",
            stamps=True,
            concurrent_writers=False,
            exact_vectors=index.exact_vectors,
            aliases=False,
            notes=tuple(notes),
        )

    def describe(self) -> CollectionInfo:
        """Facts of the folder as it is now."""
        import faiss

        with self._lock:
            state = self._current()
        index = state.index
        return CollectionInfo(
            name=f"faiss:{self._folder.path}",
            dim=index.dim,
            metric=index.metric,
            count=len(state.ids),
            index=index.description,
            server=f"faiss {faiss.__version__}",
            schema={field.name: str(field.type) for field in state.items.payload.schema},
            bytes_on_disk=state.generation[0][2],
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def scan_ids(self, *, after: ItemId | None, upto: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` ids beyond `after` and not beyond `upto`: integers ascending, or strings by code point."""
        with self._lock:
            state = self._current()
        end = len(state.ids) if upto is None else state.after(upto)
        start = state.after(after)
        return list(state.ids[start : min(end, start + max(limit, 0))])

    def read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Page:
        """Items with what was written last, published or not."""
        with self._lock:
            state = self._current()
            ranks = state.ranks(ids)
            ranks = ranks[ranks >= 0]
            found = state.vectors(ranks) if vectors else None
            stamps = [state.known_stamps[number] for number in state.stamps[ranks].tolist()]
        return Page(
            state.at(ranks),
            found,
            state.items.payload.take(state.items.rows[ranks]).to_pylist() if payload else None,
            stamps,
        )

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids beyond `after` of items whose last written vector does not carry `stamp`."""
        with self._lock:
            state = self._current()
            number = state.number(stamp)
            found: list[ItemId] = []
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
            return len(state.ids) if stamp is None else int(np.count_nonzero(state.stamps == state.number(stamp)))

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """`n` distinct ids in random order."""
        with self._lock:
            state = self._current()
        count = len(state.ids)
        return state.at(np.random.default_rng(seed).choice(count, size=min(max(n, 0), count), replace=False))

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest published items to each of `vectors` (n, dim). `exact` compares with all of them."""
        with self._lock:
            state = self._current()
            queries = _as_vectors(vectors, state.index.dim)
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

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None) -> WriteReport:
        """Makes `vectors` (n, dim) durable in a segment; `publish` brings them into the index.

        With a stamp, vectors that are not finite or all zeros are `rejected`. Without one they are taken: it may be
        what lay there before.
        """
        with self._writing:
            self._must_write()
            with self._lock:
                state = self._current()
                vectors = _as_vectors(vectors, state.index.dim)
                if len(vectors) != len(ids):
                    raise StoreRejected(f"{len(vectors)} vectors for {len(ids)} ids")
                if len(set(ids)) < len(ids):
                    twice = next(item for number, item in enumerate(ids) if item in ids[:number])
                    raise StoreRejected(f"the id {twice!r} is given more than once: every write must be unambiguous")
                ranks = state.ranks(ids)
                rejected = {} if stamp is None else _rejected(ids, vectors, ranks)
                rows = np.flatnonzero(ranks >= 0)
                if rejected:
                    rows = np.array([row for row in rows.tolist() if ids[row] not in rejected], np.int64)
                replaced = state.checksums(ranks[rows])
            written = [ids[row] for row in rows.tolist()]
            if written:
                segment = Segment(written, vectors[rows], stamp, replaced)
                self._folder.write_segment(segment)
                with self._lock:
                    self._state.apply_segment(segment)
        return WriteReport(written, [ids[row] for row in np.flatnonzero(ranks < 0).tolist()], rejected)

    def publish(self, *, final: bool = False) -> None:
        """Replaces index.faiss by one that holds what was written. Indexes that need a rebuild get it with `final`.

        Raises `StoreUnavailable`, with index.faiss as it was, if the disk does not take the new one.
        """
        with self._writing:
            self._must_write()
            for _ in range(TRIES):
                with self._lock:
                    state = self._current()
                if self._publish(state, final):
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
            following.generation = (identity(ready.stat()), state.generation[1])
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

    def forget_migration(self) -> None:
        """Removes stamps, folded segments and the original index. Refused while written vectors wait for `publish`."""
        with self._writing:
            self._must_write()
            with self._lock:
                state = self._current()
                waiting = int(state.pending.sum())
                if waiting:
                    raise StoreRejected(
                        f"{self._folder.path}: {waiting} written vectors are not published: publish them, or restore "
                        "the old ones, before the migration is forgotten"
                    )
                folder = self._folder
                folder.remove([*folder.stamp_files(), *folder.segment_files(), folder.original])
                state.stamps[:] = 0
                state.carried[:] = False
                state.unbalanced = False

    def _must_write(self) -> None:
        if self._open and self._held is None:
            raise StoreRejected(f"{self._folder.path} was opened for reading only")

    def close(self) -> None:
        """Lets go of the folder. Safe to repeat."""
        with self._writing:
            self._open = False
            if self._held is not None:
                self._held.release()
                self._held = None


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
    return same


def _as_vectors(vectors: Vectors, dim: int) -> Vectors:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(vectors, np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise StoreRejected(f"vectors of shape {array.shape} do not fit a collection of dimension {dim}")
    return array


def _rejected(ids: Sequence[ItemId], vectors: Vectors, ranks: NDArray[np.int64]) -> dict[ItemId, str]:
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    zero = np.logical_not(np.logical_or.reduce(vectors != 0, axis=1))
    wrong = np.flatnonzero((~finite | zero) & (ranks >= 0)).tolist()
    return {ids[row]: "the vector is all zeros" if finite[row] else "the vector is not finite" for row in wrong}
