"""A FAISS collection in memory: one generation of its files, with what was written since."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, StoreRejected, Vectors, order_key
from migrator.adapters.faiss.changes import Change, Changes
from migrator.adapters.faiss.folder import Folder, Generation, Segment, Stamps
from migrator.adapters.faiss.index import Index, row_checksums
from migrator.adapters.faiss.items import Items
from migrator.adapters.faiss.originals import FITS, MIN_SAMPLE, SAMPLE, Originals

SAME_VECTORS = "name the files that the index was built from as store.vectors, in the order of the items, or none"


class State:
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
        self.where = match(folder, items, index)  # position in the index
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

    def followed_by(self, index: Index) -> State:
        """The state in which `index` holds everything that was written."""
        following = State(self.folder, self.items, index, self.vector_files, self.generation)
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
        if len(ranks) < MIN_SAMPLE:
            return True
        kept = directions(self.index.vectors(self.where[ranks]))
        exact = directions(self.vector_files.vectors(self.items.rows[ranks]))
        own, others = (np.einsum("nd,nd->n", kept, some) for some in (exact, np.roll(exact, 1, axis=0)))
        return bool(np.mean(own >= others) >= FITS)

    def note_replaced(self, before: State) -> None:
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


def match(folder: Folder, items: Items, index: Index) -> NDArray[np.int64]:
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


def unchanged(state: State, original: Index) -> NDArray[np.bool_]:
    """(n,) which items have, by what was written last, the vector that the original index holds for them."""
    try:
        where = match(state.folder, state.items, original)
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


def notes(state: State, *, outdated: bool) -> Iterator[str]:
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


def directions(vectors: Vectors) -> Vectors:
    """Vectors at unit length; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
