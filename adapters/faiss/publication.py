"""What a publication writes: the following index, the stamps that hold for it, and the merged files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, Vectors
from migrator.adapters.faiss.folder import Folder, Stamps
from migrator.adapters.faiss.index import Index, row_checksums
from migrator.adapters.faiss.items import write_parquet_like
from migrator.adapters.faiss.payload import Row, fitting, joined, take
from migrator.adapters.faiss.state import State, unchanged


def following_state(state: State, *, final: bool) -> tuple[State, Callable[[Callable[[bytes], object]], object]]:
    """The generation after `state`, and what writes its index file."""
    folder, index = state.folder, state.index
    everything = np.arange(len(state.ids))
    same = np.zeros(len(state.ids), bool)
    if final:
        original = folder.read_index(folder.original)
        same = unchanged(state, original)
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


def write_stamps(state: State) -> list[Path]:
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
    return [state.folder.write_stamps(stamps)]


def write_merged_stamps(
    folder: Folder, stamps: Mapping[int, tuple[ItemId, str]], vectors: Vectors, labels: NDArray[np.int64], index: Index
) -> None:
    """Writes down the stamps of merged items, with the checksums that their vectors have in `index`."""
    if not stamps:
        return
    rows = np.array(list(stamps), np.int64)
    kept = vectors[rows]
    if not index.exact_vectors or index.normalises:
        filled = index.reread()
        order = np.argsort(filled.labels)
        kept = filled.vectors(order[np.searchsorted(filled.labels[order], labels[rows])])
    folder.write_stamps(
        Stamps(
            [item for item, _ in stamps.values()],
            [stamp for _, stamp in stamps.values()],
            row_checksums(kept),
            False,
        )
    )


class Merged:
    """All items with what was inserted and removed, row by row. Those that stay keep their order, what is new follows.

    vectors (m, dim), FAISS ids (m,), and stamps where there are, by row.
    """

    def __init__(self, state: State) -> None:
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
