"""What every adapter checks of the vectors that it is given, and how it tells that an item has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from migrator.adapters.base import ItemId, Page, StoreRejected, Vectors

Contents: TypeAlias = tuple[bytes, dict[str, Any]]
"""Vector and payload of an item."""


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


def as_queries(vectors: Vectors, dim: int, k: int) -> Vectors:
    """`vectors` as (n, dim) for a search of the k nearest. Raises `StoreRejected` for what cannot be searched."""
    queries = as_batch(vectors, dim)
    if k < 1 or not np.isfinite(queries).all():
        raise StoreRejected(f"a search needs finite vectors and at least one result, k is {k}")
    return queries


def unusable(ids: Sequence[ItemId], vectors: Vectors) -> dict[ItemId, str]:
    """Items whose vector (n, dim) no encoder should give, with the reason."""
    finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    zero = np.logical_not(np.logical_or.reduce(vectors != 0, axis=1))
    return {
        ids[row]: "the vector is all zeros" if finite[row] else "the vector is not finite"
        for row in np.flatnonzero(~finite | zero).tolist()
    }


def contents(page: Page) -> dict[ItemId, Contents]:
    """What lies in each item of a page that was read with vectors and payloads."""
    return {
        item: (vector.tobytes(), dict(payload))
        for item, vector, payload in zip(page.ids, page.vectors, page.payloads, strict=True)
    }


def one_line(error: object) -> str:
    """A client's message, short enough to be part of one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
