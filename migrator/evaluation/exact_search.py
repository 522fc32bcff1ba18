"""Exact search: the k nearest gallery vectors of each query, over one gallery and over galleries half re-embedded.

float32 matrix products find candidates, and float64 decides among them. What a matrix product gives for a pair depends
in its last bits on where the pair lies in the matrix; a float64 score of `pair_scores` does not. So equal vectors tie
exactly, and a ranking depends on nothing but the vectors: not on blocks, threads, the other queries, or the gallery's
order. A ranking is an array of gallery indices, nearest first, padded with -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SCORES = 1 << 24  # of one matrix product, 64 MiB: NumPy compares rows under 8192 numbers three times slower
_PASSING = 1 << 22  # pairs that are rescored at a time
_QUERIES = 2048
_RESULTS = 1 << 20  # k x queries that are searched at a time
_PAIRS = 1 << 16  # numbers of one side of the pairs that are scored at a time, as many as a core's cache holds


class _Nearest(NamedTuple):
    """Results of each query, nearest first."""

    rows: NDArray[np.int32]  # (q, k) gallery rows, padded with -1
    scores: NDArray[np.float64]  # (q, k) padded with -inf

    @classmethod
    def none(cls, queries: int, k: int) -> _Nearest:
        return cls(np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf))


class _Candidates(NamedTuple):
    """Pairs that may be results, with their score in float32."""

    query: NDArray[np.int16]  # (n,) within the queries of one block
    row: NDArray[np.int32]  # (n,)
    score: NDArray[np.float32]  # (n,)


def rank(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    k: int,
    *,
    exclude: NDArray[np.integer] | None = None,
) -> NDArray[np.int32]:
    """The exact k nearest gallery vectors of each query by inner product: (q, k) gallery indices, nearest first.

    queries is (q, d), gallery (g, d), both of unit length where cosine is meant. `exclude` (q,) holds the gallery
    index of the query itself, or -1: it is never among the results. Equal scores are ordered by gallery index.
    Where there are fewer than k results the row ends in -1. Memory beyond the results does not grow with q or g. A
    gallery in which nearly everything ties, as of an encoder that gives one vector for all images, takes far longer.
    Queries of several encoders against one gallery are fastest in one call.

    Raises ValueError for shapes that do not fit, numbers that are not finite, and k below 1.
    """
    _check(queries, gallery, k, exclude)
    return _nearest(queries, gallery, np.arange(len(gallery), dtype=np.int32), k, exclude).rows


def mixtures(
    queries: NDArray[np.float32],
    gallery_old: NDArray[np.float32],
    gallery_new: NDArray[np.float32],
    order: NDArray[np.integer],
    shares: Sequence[float],
    k: int,
    *,
    exclude: NDArray[np.integer] | None = None,
) -> list[NDArray[np.int32]]:
    """What `rank` gives while the gallery is re-embedded: one (q, k) ranking for each of `shares`.

    At a share, the first `round(share * g)` rows of `order` (g,) have their vector from `gallery_new` (g, d) and the
    others from `gallery_old` (g, d). The shares rise within 0 to 1. Each gallery is passed once, whatever the number
    of shares: rows between two shares change sides together, and no mixture needs more of them than their k nearest by
    old and by new vectors.

    Raises ValueError as `rank`, and for an order that does not name each gallery row once.
    """
    for gallery in (gallery_old, gallery_new):
        _check(queries, gallery, k, exclude)
    count = len(gallery_old)
    if len(gallery_new) != count or not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError(f"order must name each row of two galleries of the same length once, of {count} rows")
    if not all(0 <= share <= 1 for share in shares) or any(np.diff(shares) < 0):
        raise ValueError(f"shares must rise within 0 to 1, these are {list(shares)}")
    cuts = [0, *(round(share * count) for share in shares), count]
    parts = [np.sort(order[start:stop]).astype(np.int32) for start, stop in pairwise(cuts)]
    # Mixture i has the new vectors of parts 0 to i and the old ones of the parts after it. So no mixture needs a vector
    # with k better ones among the new of its part and the parts before, or the old of its part and the parts after.
    still_old = [_Nearest.none(len(queries), k)]
    for part in reversed(parts[1:]):
        still_old.append(_merged(still_old[-1], _nearest(queries, gallery_old, part, k, exclude, still_old[-1])))
    done = _Nearest.none(len(queries), k)
    rankings = []
    for part, rest in zip(parts[:-1], still_old[:0:-1], strict=True):
        done = _merged(done, _nearest(queries, gallery_new, part, k, exclude, done))
        rankings.append(_merged(done, rest).rows)
    return rankings


def pair_scores(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], pairs: NDArray[np.integer]
) -> NDArray[np.float64]:
    """The inner product of each pair: of a row of queries (q, d) and a row of gallery (g, d). (n, 2) -> (n,)"""
    scores = np.empty(len(pairs))
    step = max(1, _PAIRS // max(1, queries.shape[1]))
    for start in range(0, len(pairs), step):
        asking, stored = pairs[start : start + step].T
        np.einsum(
            "nd,nd->n",
            queries[asking].astype(np.float64),
            gallery[stored].astype(np.float64),
            out=scores[start : start + step],
        )
    return scores


def _check(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int, exclude: NDArray[np.integer] | None
) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape} must be (q, d) and (g, d)")
    if k < 1:
        raise ValueError(f"k is {k}, must be at least 1")
    if exclude is not None and (
        exclude.shape != (len(queries),) or (exclude >= len(gallery)).any() or (exclude < -1).any()
    ):
        raise ValueError("exclude must hold, for each query, a gallery index or -1")


def _nearest(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    rows: NDArray[np.int32],
    k: int,
    exclude: NDArray[np.integer] | None,
    besides: _Nearest | None = None,
) -> _Nearest:
    """The k nearest of the gallery's `rows`, which ascend; without those that have k better ones in `besides`."""
    found = _Nearest.none(len(queries), k)
    step = max(1, min(_QUERIES, _RESULTS // k))
    for start in range(0, len(queries), step):
        group = slice(start, start + step)
        own = None if exclude is None else exclude[group]
        kth = np.full(len(queries[group]), -np.inf) if besides is None else besides.scores[group, -1]
        candidates = _search(queries[group], gallery, rows, k, own, kth)
        place, candidates, exact = _exactly(queries[group], gallery, candidates, k)
        found.rows[start + candidates.query.astype(np.int64), place] = candidates.row
        found.scores[start + candidates.query.astype(np.int64), place] = exact
    return found


def _search(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    rows: NDArray[np.int32],
    k: int,
    own: NDArray[np.integer] | None,
    kth: NDArray[np.float64],
) -> _Candidates:
    """All of `rows` that can be among the k nearest of a query, and a few more.

    The k-th best score so far, `kth` (q,) to begin with, is a threshold, below which a block's scores are skipped.
    A float32 score is off by at most d u |q|.|g|, u = 2^-24, whatever the order of the sum (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1): what is below the threshold by twice as much is no answer in
    exact terms either.
    """
    count, dim = queries.shape
    # |q|.|g| <= sum |q| * max |g|. A tenth more, for the second-order terms and the threshold's own rounding; and what
    # is lost where numbers are so small that float32 has few bits for them.
    sizes = np.abs(queries).sum(axis=1, dtype=np.float64)
    relative, absolute = 1.1 * (dim + 4) * 2.0**-24, (dim + 4) * float(np.finfo(np.float32).tiny)
    largest = np.float32(0)
    width = max(1, _SCORES // max(1, count, dim))
    products = np.empty((count, min(width, len(rows))), np.float32)
    passing = np.empty(products.shape, np.bool_)
    kept = _Candidates(np.empty(0, np.int16), np.empty(0, np.int32), np.empty(0, np.float32))
    waiting: list[_Candidates] = []
    for start in range(0, len(rows), width):
        block_rows = rows[start : start + width]
        contiguous = block_rows[-1] - block_rows[0] + 1 == len(block_rows)
        block = gallery[block_rows[0] : block_rows[-1] + 1] if contiguous else gallery[block_rows]
        largest = np.maximum(largest, np.maximum(block.max(initial=0), -block.min(initial=0)))
        if not float(sizes.max(initial=0)) * float(largest) < float(np.finfo(np.float32).max):  # NaN neither
            raise ValueError("queries or gallery hold numbers that are not finite, or too large")
        slack = 2 * (relative * sizes * float(largest) + absolute)
        scores, over = products[:, : len(block)], passing[:, : len(block)]
        np.matmul(queries, block.T, out=scores)
        if np.isneginf(kth).any() and len(block) > k + 1:
            # Nothing to compare with yet. One of the k + 1 best may be the query itself.
            some = scores[:, : 32 * (k + 1)]
            at = some.shape[1] - k - 1
            kth = np.maximum(kth, np.partition(some, at, axis=1)[:, at])
        np.greater_equal(scores, (kth - slack).astype(np.float32)[:, None], out=over)
        passed = np.flatnonzero(over)  # much faster than nonzero of a matrix
        # Where nearly all scores tie, nearly all pass: then they are rescored in parts, for memory.
        for begin in range(0, len(passed), _PASSING):
            asking, column = np.divmod(passed[begin : begin + _PASSING], len(block))
            row = block_rows[column]
            if own is not None:
                other = row != own[asking]
                asking, column, row = asking[other], column[other], row[other]
            waiting.append(_Candidates(asking.astype(np.int16), row, scores[asking, column]))
            if start == 0 or sum(len(part.row) for part in waiting) > k * count:
                kept, kth = _cut([kept, *waiting], k, kth, slack)
                waiting = []
                if len(kept.row) > 2 * k * count:  # so many ties that memory would grow with them
                    kept = _exactly(queries, gallery, kept, k)[1]
    return _joined([kept, *waiting])


def _joined(parts: Sequence[_Candidates]) -> _Candidates:
    return _Candidates(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _cut(
    parts: Sequence[_Candidates], k: int, kth: NDArray[np.float64], slack: NDArray[np.float64]
) -> tuple[_Candidates, NDArray[np.float64]]:
    """What is left of the candidates, by query and score, and each query's k-th best score, -inf without k."""
    query, row, score = _joined(parts)
    order = np.lexsort((-score, query))
    query, row, score = query[order], row[order], score[order]
    first = np.searchsorted(query, np.arange(len(kth) + 1))
    full = np.flatnonzero(np.diff(first) >= k)
    kth = kth.copy()
    kth[full] = np.maximum(kth[full], score[first[full] + k - 1])
    keep = score >= (kth - slack)[query]
    return _Candidates(query[keep], row[keep], score[keep]), kth


def _exactly(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], candidates: _Candidates, k: int
) -> tuple[NDArray[np.int64], _Candidates, NDArray[np.float64]]:
    """The k nearest candidates of each query: their place from 0 on, the candidates, and their float64 scores. (n,)"""
    query, row, score = candidates
    exact = pair_scores(queries, gallery, np.stack([query, row], axis=1))
    order = np.lexsort((row, -exact, query))
    query, row, score, exact = query[order], row[order], score[order], exact[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    best = place < k
    return place[best], _Candidates(query[best], row[best], score[best]), exact[best]


def _merged(one: _Nearest, other: _Nearest) -> _Nearest:
    """The nearest of two sets of answers to the same queries."""
    k = one.rows.shape[1]
    rows, scores = np.hstack([one.rows, other.rows]), np.hstack([one.scores, other.scores])
    order = np.lexsort((rows, -scores))[:, :k]
    return _Nearest(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))
