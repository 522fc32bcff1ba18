"""FAISS: the user's index and Parquet files of items, which applications read with FAISS and Arrow.

Items and vectors belong together by FAISS id: the column `faiss_id` if there is one, else the item's id where the
index has an ID map, else the row number. An item's id is the column `id`, else the row number. Where files with the
exact vectors lie beside an index that keeps approximations, vectors that no migration has replaced are read from them.

How a crash or the application's own writes do no harm: a written vector goes to a segment file together with the
checksum of the vector that it replaces. A row of a segment is *pending* while index.faiss holds that vector,
*applied* when it holds the written one, and void when it holds a third one, which somebody else wrote later. Stamps
of published vectors are kept beside their checksums and hold while these agree. So what is true follows from the
files alone, whichever of them a killed process had reached.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import (
    BaseStore,
    Capabilities,
    CollectionInfo,
    Hits,
    ItemId,
    Page,
    Reading,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    order_key,
    same_value,
)
from migrator.adapters.faiss.changes import ABSENT, Change
from migrator.adapters.faiss.folder import Folder, Generation, Segment, identity, make_folder
from migrator.adapters.faiss.index import row_checksums
from migrator.adapters.faiss.loading import check_there, read_state
from migrator.adapters.faiss.payload import fitting, take
from migrator.adapters.faiss.payload import rows as rows_of
from migrator.adapters.faiss.publication import Merged, following_state, write_merged_stamps, write_stamps
from migrator.adapters.faiss.state import State, notes
from migrator.adapters.files import Vanished, replace_link
from migrator.adapters.vectors import as_batch, as_queries, unusable

if TYPE_CHECKING:
    import filelock

TRIES = 20  # a folder that is replaced again and again while we read it
STEADY = 6  # looks at the same two files that do not fit before they are refused: the second may be on its way
PAUSE = 0.05  # seconds between them: an application replaces its two files one after the other


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


class FaissStore(BaseStore):
    """A collection in a FAISS folder. One thread may read while another writes."""

    def __init__(self, folder: Folder, *, write: bool) -> None:
        self._folder, self._collection, self._write = folder, folder.collection_id, write
        self._lock = threading.RLock()  # over the state in memory; never held during a write to the disk
        self._writing = threading.Lock()  # one write or publication at a time
        self._held: filelock.BaseFileLock | None = None
        check_there(folder)
        if write:
            self._held = folder.lock()
        try:
            self._state = self._load()
            self._first_items = self._state.generation.of_items
        except BaseException:
            self.close()
            raise

    # -- loading --------------------------------------------------------------------------------------------------

    def _load(self) -> State:
        """The folder as it is, all files of one generation."""
        seen: list[Generation] = []
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            generation = self._folder.identity()
            seen.append(generation)
            try:
                state = read_state(self._folder, generation)
            except (StoreRejected, Vanished):
                if self._folder.identity() == generation and seen.count(generation) >= STEADY:
                    raise
                continue
            if self._folder.identity() == generation:
                return state
        raise StoreUnavailable(f"{self._folder.collection_id} keeps being replaced: try again when nothing replaces it")

    def _current(self) -> State:
        """The state in memory, after a look whether the application has replaced a file. Call with `_lock` held."""
        self._must_be_open()
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
            notes=tuple(notes(state, outdated=outdated)),
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

    def _read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Reading:
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
            return Reading(there, found, payloads, stamps)
        place = {item: row for row, item in enumerate(plain)}
        mixed = [(place.get(item, -1), staged.get(item)) for item in there]
        return Reading(
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
            return self.read(self.scan_ids(after=after, up_to=up_to, limit=limit))

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

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest published items to each of `vectors` (n, dim). `exact` compares with all of them."""
        with self._lock:
            state = self._current()
            queries = as_queries(vectors, state.index.dim, k)
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
                now = self._read(ids, vectors=expected is not None, payload=self._items_replaced(state))
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
                again = self.read_payloads([ids[row] for row in staged])
                self._insert(Page(again.ids, vectors[staged], again.payloads, [stamp] * len(staged)))
        return WriteReport(written, [item for item in ids if item not in there], rejected, changed)

    def _items_replaced(self, state: State) -> bool:
        """Whether payloads may have changed since this store was opened."""
        return state.generation.of_items != self._first_items

    def insert(self, page: Page) -> WriteReport:
        """Makes whole items durable beside the two files; `publish(final=True)` brings them in."""
        with self._writing:
            self._must_write()
            return self._insert(page)

    def _insert(self, page: Page) -> WriteReport:
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
                there = list(self.read_stamps(ids).ids)
                change = Change(there, self._replaced(state, there))
            if there:
                self._folder.write_change(change)
                with self._lock:
                    self._state.apply_change(change)

    @staticmethod
    def _replaced(state: State, ids: Sequence[ItemId]) -> NDArray[np.uint64]:
        present = state.checksums_of(ids)
        return np.array([present.get(item, ABSENT) for item in ids], np.uint64)

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
        raise StoreUnavailable(f"{self._folder.index} keeps being replaced: try again when nothing replaces it")

    def _publish(self, state: State, final: bool) -> bool:
        """One attempt; False if the application replaced a file meanwhile."""
        folder = self._folder
        if not (state.index.updates_in_place or final):
            return True
        old_files = [*folder.stamp_files(), *folder.segment_files()]
        if not (state.pending.any() or (final and state.unbalanced)):
            if folder.segment_files():
                write_stamps(state)
                folder.remove(old_files)
            return True
        if not folder.original.exists():
            folder.keep_original()
        following, write = following_state(state, final=final)
        if folder.identity() != state.generation:
            return False
        ready = folder.prepare(write)
        try:
            following.generation = state.generation._replace(of_index=identity(ready.stat()))
            # The stamps come first: until the rename they fit no vector that they should not.
            stamps = write_stamps(following)
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

    def _merge(self, state: State) -> bool:
        """One attempt at bringing inserted and removed items into the two files; False if one was replaced."""
        folder = self._folder
        old_files = [*folder.stamp_files(), *folder.segment_files(), *folder.change_files()]
        merged = Merged(state)
        vectors, labels, stamps = merged.vectors, merged.labels, merged.stamps
        index = folder.read_index(folder.index)
        index.fill(vectors, labels)
        ready = folder.prepare(index.write)
        try:
            # Of vectors that the files do not hold yet: until they do, these stamps fit nothing.
            write_merged_stamps(folder, stamps, vectors, labels, index)
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
        return FaissStore(self._folder.opened_as(collection_id), write=self._write)

    def create_like(self, collection_id: str, *, dim: int) -> FaissStore:
        """A new folder with an empty index of the same kind and parameters, and the same columns."""
        self._must_write()
        path = Path(collection_id)
        if path.exists():
            store = FaissStore(Folder(path), write=True)
            if not store._folder.created.exists():
                store.close()
                raise StoreRejected(f"{path} exists already and was not created by migrator: remove it, or plan again")
            if store.describe().dim != dim:
                store.close()
                raise StoreRejected(f"{path} exists already, for vectors of another dimension than {dim}: remove it")
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

    def close(self) -> None:
        """Releases the folder. Safe to repeat."""
        with self._writing:
            self._open = False
            if self._held is not None:
                self._folder.remove_empty_folders()
                self._held.release()
                self._held = None


def _changed(expected: Page, now: Reading) -> list[ItemId]:
    """Items whose vector, or payload where it is given, is another than it was."""
    assert now.vectors is not None
    before = dict(zip(expected.ids, row_checksums(expected.vectors).tolist(), strict=True))
    after = zip(now.ids, row_checksums(now.vectors).tolist(), strict=True)
    changed = {item for item, checksum in after if before.get(item) != checksum}
    if now.payloads is not None:
        payloads = dict(zip(expected.ids, expected.payloads, strict=True))
        changed |= {
            item
            for item, fields in zip(now.ids, now.payloads, strict=True)
            if not same_value(payloads.get(item), fields)
        }
    return [item for item in now.ids if item in changed]


def _not_ours(changed: list[ItemId], now: Reading, ids: Sequence[ItemId], vectors: Vectors, stamp: str) -> list[ItemId]:
    """Those of `changed` that do not bear `vectors` and `stamp` already, from this very call, repeated."""
    assert now.vectors is not None
    row, place = {item: row for row, item in enumerate(ids)}, {item: at for at, item in enumerate(now.ids)}
    return [
        item
        for item in changed
        if now.stamps[place[item]] != stamp or now.vectors[place[item]].tobytes() != vectors[row[item]].tobytes()
    ]
