"""Items that were inserted or removed and are not part of the user's two files yet.

A change goes to a file of its own together with the checksum of the vector that the item had then (0: none). It holds
while that is still so; when the application has written the item since, the change is void.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, Vectors, order_key
from migrator.adapters.faiss.payload import Row, rows

if TYPE_CHECKING:
    import pyarrow as pa

ABSENT = np.uint64(0)
"""In place of a checksum: there was no such item."""


@dataclass(frozen=True, slots=True)
class Change:
    """One batch: whole items, or, where `vectors` is None, removals."""

    ids: Sequence[ItemId]
    replaced: NDArray[np.uint64]  # (n,)
    vectors: Vectors | None = None  # (n, dim)
    payload: pa.Table | None = None
    stamps: Sequence[str | None] = ()


@dataclass(frozen=True, slots=True)
class Staged:
    """An item as it will be, once published."""

    vector: NDArray[np.float32]
    payload: Row
    stamp: str | None


class Changes:
    """The changes that hold, by item; None stands for a removal."""

    def __init__(self) -> None:
        self.by_id: dict[ItemId, Staged | None] = {}
        self._ordered: list[ItemId] | None = None

    def __bool__(self) -> bool:
        return bool(self.by_id)

    def apply(self, change: Change, present: Mapping[ItemId, np.uint64]) -> None:
        """Takes over those rows whose item the files still have as it was; `present` has checksums by id."""
        hold = [row for row, item in enumerate(change.ids) if present.get(item, ABSENT) == change.replaced[row]]
        if change.vectors is None:
            for row in hold:
                item = change.ids[row]
                if item in present:
                    self.by_id[item] = None
                else:
                    self.by_id.pop(item, None)
        else:
            assert change.payload is not None
            payloads = rows(change.payload, hold)
            for row, payload in zip(hold, payloads, strict=True):
                self.by_id[change.ids[row]] = Staged(change.vectors[row], payload, change.stamps[row])
        self._ordered = None

    def after(self, item: ItemId | None) -> Iterator[ItemId]:
        """Ids of staged items beyond `item`, in order."""
        if self._ordered is None:
            self._ordered = sorted((item for item, staged in self.by_id.items() if staged is not None), key=order_key)
        start = 0 if item is None else bisect.bisect_right(self._ordered, order_key(item), key=order_key)
        for place in range(start, len(self._ordered)):
            yield self._ordered[place]

    def staged(self) -> Iterator[tuple[ItemId, Staged]]:
        """Every item that will be there."""
        return ((item, staged) for item, staged in self.by_id.items() if staged is not None)
