"""What every adapter checks of the vectors that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapters.base import ItemId, StoreRejected, Vectors


def as_batch(vectors: Vectors, dim: int, ids: Sequence[ItemId] | None = None) -> Vectors:
    """`vectors` as a contiguous float32 array (n, dim), one for each of `ids`, if given, and no id twice.

    Raises `StoreRejected`.
    """
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(vectors, np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise StoreRejected(f"vectors of shape {array.shape} do not fit a collection of dimension {dim}")
    if ids is not None and len(array) != len(ids):
        raise StoreRejected(f"{len(array)} vectors for {len(ids)} ids")
    if ids is not None and len(set(ids)) < len(ids):
        seen: set[ItemId] = set()
        twice = next(item for item in ids if item in seen or seen.add(item))  # type: ignore[func-returns-value]
        raise StoreRejected(f"the id {twice!r} is given more than once: every write must be unambiguous")
    return array


def unusable(ids: Sequence[ItemId], vectors: Vectors) -> dict[ItemId, str]:
    """Items whose vector (n, dim) no encoder should give, with the reason."""
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    zero = np.logical_not(np.logical_or.reduce(vectors != 0, axis=1))
    return {
        ids[row]: "the vector is all zeros" if finite[row] else "the vector is not finite"
        for row in np.flatnonzero(~finite | zero).tolist()
    }
