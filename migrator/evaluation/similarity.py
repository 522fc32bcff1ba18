"""How high relevant and irrelevant pairs score under each pair of encoders: applications accept results by a threshold.

A pair is a query and a gallery item, positive where the item is relevant to the query and negative elsewhere. Tests are
named as in verification: `baseline` M(old, old), `cross` M(new, old), `self` M(new, new), `reverse` M(old, new).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from migrator.evaluation.exact_search import pair_scores
from migrator.evaluation.metrics import tag_matrices

LIMIT = 50_000
"""Pairs of each kind that are scored."""
PASS_TODAY = 0.01
"""The share of today's negatives that the threshold of `shift` lets pass."""
MIN_NEGATIVES = 1_000
"""With fewer, 1 % of them are less than ten pairs, too few to estimate a threshold."""
TIMES = 3.0
POINTS = 0.1

_ROUNDS = 10


class Pairs(NamedTuple):
    """Pairs of a query row and a gallery row, each pair once."""

    positives: NDArray[np.int64]  # (n, 2)
    negatives: NDArray[np.int64]  # (m, 2)


class Scores(NamedTuple):
    """Scores of the same pairs under one pair of encoders."""

    positives: NDArray[np.float64]  # (n,)
    negatives: NDArray[np.float64]  # (m,)


class ScoreHistograms(NamedTuple):
    """Numbers of pairs by score, over the same bins in all tests."""

    edges: NDArray[np.float64]  # (bins + 1,) rising; the last bin has its upper edge in it
    counts: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Test -> positives and negatives in each bin, (bins,) both."""

    def to_json(self) -> dict[str, Any]:
        """The edges, and for each test its counts, as lists."""
        return {
            "edges": self.edges.tolist(),
            "tests": {
                test: {"positives": positives.tolist(), "negatives": negatives.tolist()}
                for test, (positives, negatives) in self.counts.items()
            },
        }


class Passing(NamedTuple):
    """Shares of the pairs that score at least as high as a threshold."""

    positives: float | None
    """None where there is no such pair."""
    negatives: float


class Shift(NamedTuple):
    """What becomes of a threshold that was set for today's search."""

    threshold: float
    """A score that 1 % of today's negatives reach."""
    tests: dict[str, Passing]

    @property
    def sentence(self) -> str | None:
        """What an operator must know; None where the threshold keeps its meaning.

        It does where, in the cross-test and after the backfill, negatives pass at most three times and at least a third
        as often as today, and the share of positives changes by at most ten points.
        """
        today = self.tests["baseline"]
        later = {name: self.tests[test] for test, name in _LATER.items() if test in self.tests}
        moved = [name for name, then in later.items() if _negatives_moved(today, then) or _positives_moved(today, then)]
        if not moved:
            return None
        text = (
            f"an application that accepts results from a score of {self.threshold:.3f} on lets "
            f"{_percent(today.negatives)} of irrelevant pairs pass today and would let "
            + ", ".join(
                f"{_percent(then.negatives)} {'pass ' if number == 0 else ''}{name}"
                for number, (name, then) in enumerate(later.items())
            )
        )
        if any(_positives_moved(today, then) for then in later.values()):
            text += f"; of relevant pairs {_percent(today.positives)} pass today, " + ", ".join(
                f"{_percent(then.positives)} {name}" for name, then in later.items()
            )
        if _LATER["cross"] not in later:
            return f"{text}: set it again when queries move"
        if _LATER["cross"] not in moved:
            return f"{text}: set it again as the backfill continues"
        return f"{text}: set it again, and during the backfill choose it per stage"

    def to_json(self) -> dict[str, Any]:
        """The threshold, the shares of each test, and the sentence or None."""
        return {
            "threshold": self.threshold,
            "tests": {test: passing._asdict() for test, passing in self.tests.items()},
            "sentence": self.sentence,
        }


_LATER = {"cross": "in the cross-test", "self": "after the backfill"}


def draw_pairs(
    query_codes: NDArray[np.integer],
    gallery_codes: NDArray[np.integer],
    *,
    own: NDArray[np.integer] | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> Pairs:
    """Pairs drawn at random where items of a query's class are relevant: all positives up to `limit`, and negatives.

    query_codes (q,) and gallery_codes (g,) are codes of classes, below 0 for none. A query is no pair with the gallery
    row `own` (q,), which is -1 where there is none. There are `limit` negatives, or most of those there are.
    """
    random = np.random.default_rng(seed)
    by_code = np.argsort(gallery_codes, kind="stable")
    first, last = (np.searchsorted(gallery_codes[by_code], query_codes, side=side) for side in ("left", "right"))
    # The positives of all queries one after the other, as a list that is never made.
    ends = np.cumsum(np.where(query_codes < 0, 0, last - first))
    place = _some(ends[-1] if len(ends) else 0, limit, random)
    query = np.searchsorted(ends, place, side="right")
    row = by_code[last[query] - (ends[query] - place)]
    positives = np.stack([query, row], axis=1)

    def relevant(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        codes = query_codes[pairs[:, 0]]
        same: NDArray[np.bool_] = codes == gallery_codes[pairs[:, 1]]
        return same & (codes >= 0)

    sizes = len(query_codes), len(gallery_codes)
    return Pairs(_without_own(positives, own), _negatives(sizes, relevant, own, limit, random))


def draw_tag_pairs(
    query_tags: Sequence[Sequence[str]],
    gallery_tags: Sequence[Sequence[str]],
    *,
    own: NDArray[np.integer] | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> Pairs:
    """As `draw_pairs`, where each query (q) and item (g) has several labels: one in common makes an item relevant.

    A positive that shares several labels is drawn more easily, and counts once.
    """
    random = np.random.default_rng(seed)
    queries, items = tag_matrices(query_tags, gallery_tags)
    # A row of a tag each, so that the positives of one class are those of a tag.
    (query, query_code), (item, item_code) = queries.nonzero(), items.nonzero()
    shared = draw_pairs(query_code, item_code, limit=limit, seed=seed).positives
    positives = np.unique(np.stack([query[shared[:, 0]], item[shared[:, 1]]], axis=1).astype(np.int64), axis=0)

    def relevant(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        in_common = queries[pairs[:, 0]].multiply(items[pairs[:, 1]]).sum(axis=1)
        found: NDArray[np.bool_] = np.asarray(in_common).ravel() > 0
        return found

    negatives = _negatives((len(query_tags), len(gallery_tags)), relevant, own, limit, random)
    return Pairs(_without_own(positives, own), negatives)


def draw_listed_pairs(
    relevant: Sequence[Mapping[int, float]],
    gallery: int,
    *,
    own: NDArray[np.integer] | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> Pairs:
    """As `draw_pairs`, where `relevant[i]` gives the rows of a gallery of that size that are relevant to query i.

    The mapping is of row to grade, as in `graded_relevance`; a grade of 0 is not relevant. Raises ValueError for rows
    that the gallery does not have.
    """
    random = np.random.default_rng(seed)
    query = np.repeat(np.arange(len(relevant)), [len(of) for of in relevant])
    row = np.fromiter((row for of in relevant for row in of), np.int64, len(query))
    grade = np.fromiter((grade for of in relevant for grade in of.values()), np.float64, len(query))
    if ((row < 0) | (row >= gallery)).any():
        raise ValueError(f"relevant items must be rows of the gallery, from 0 to {gallery - 1}")
    listed = np.stack([query, row], axis=1)[grade > 0]
    keys = listed @ [gallery, 1]

    def is_listed(pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.isin(pairs @ [gallery, 1], keys)

    positives = _without_own(listed[_some(len(listed), limit, random)], own)
    return Pairs(positives, _negatives((len(relevant), gallery), is_listed, own, limit, random))


def score_pairs(
    tests: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]], pairs: Pairs
) -> dict[str, Scores]:
    """The scores of the pairs in each test, which is its queries (q, d) and its gallery (g, d).

    No more of the q x g scores is ever computed. Raises ValueError for scores that are not finite.
    """
    found = {}
    for test, (queries, gallery) in tests.items():
        found[test] = Scores(*(pair_scores(queries, gallery, some) for some in pairs))
        if not all(np.isfinite(scores).all() for scores in found[test]):
            raise ValueError(f"queries or gallery of the test {test} hold numbers that are not finite")
    return found


def score_histograms(scores: Mapping[str, Scores], bins: int = 40) -> ScoreHistograms:
    """Histograms over `bins` equal bins from the lowest score of any test to the highest."""
    everything = np.concatenate([np.empty(0), *(some for of_test in scores.values() for some in of_test)])
    edges = np.histogram_bin_edges(everything, bins)
    return ScoreHistograms(
        edges,
        {
            test: (np.histogram(positives, edges)[0], np.histogram(negatives, edges)[0])
            for test, (positives, negatives) in scores.items()
        },
    )


def shift(scores: Mapping[str, Scores]) -> Shift | None:
    """What a threshold that lets 1 % of today's negatives (the test `baseline`) pass, lets pass in each test.

    None where the negatives are fewer than `MIN_NEGATIVES`.
    """
    today = scores["baseline"].negatives
    if len(today) < MIN_NEGATIVES:
        return None
    at = len(today) - int(PASS_TODAY * len(today))
    threshold = float(np.partition(today, at)[at])
    return Shift(
        threshold,
        {
            test: Passing(
                float((positives >= threshold).mean()) if len(positives) else None,
                float((negatives >= threshold).mean()),
            )
            for test, (positives, negatives) in scores.items()
        },
    )


def _some(count: int, limit: int, random: np.random.Generator) -> NDArray[np.int64]:
    """`limit` numbers below `count`, or all of them; ascending."""
    if count <= limit:
        return np.arange(count)
    return np.sort(random.choice(count, limit, replace=False))


def _without_own(pairs: NDArray[np.int64], own: NDArray[np.integer] | None) -> NDArray[np.int64]:
    return pairs if own is None else pairs[own[pairs[:, 0]] != pairs[:, 1]]


def _negatives(
    sizes: tuple[int, int],
    relevant: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    own: NDArray[np.integer] | None,
    limit: int,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """Irrelevant pairs, drawn at random. Where nearly all are relevant, the draw ends with fewer."""
    keys = np.empty(0, np.int64)
    for _ in range(_ROUNDS if min(sizes) else 0):
        drawn = random.integers(0, sizes, (limit, 2))
        irrelevant = _without_own(drawn[~relevant(drawn)], own)
        keys = np.unique(np.concatenate([keys, irrelevant @ [sizes[1], 1]]))
        if len(keys) >= limit:
            break
    keys = keys[_some(len(keys), limit, random)]
    return np.stack(np.divmod(keys, max(1, sizes[1])), axis=1)


def _negatives_moved(today: Passing, then: Passing) -> bool:
    return then.negatives > TIMES * today.negatives or TIMES * then.negatives < today.negatives


def _positives_moved(today: Passing, then: Passing) -> bool:
    if today.positives is None or then.positives is None:
        return False
    return abs(then.positives - today.positives) > POINTS


def _percent(share: float | None) -> str:
    assert share is not None  # the positives are the same pairs in all tests: all have them, or none
    return f"{100 * share:.1f} %" if share >= 0.0005 else "less than 0.1 %"
