"""Retrieval metrics per query, and the scores by which backward-compatible encoders are compared.

M(q, g) is a retrieval metric with queries from encoder q and a gallery from encoder g. Scores follow the AdvBCT
paper (arXiv 2305.02610, section 4.1). A ranking is an array of gallery indices, nearest first, padded with -1.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]


_CELLS = 1 << 24
"""Pairs of a query and an item that are compared at once."""


class Relevance(NamedTuple):
    """Which results are relevant, and how many relevant items there are."""

    hits: Bools  # (q, k)
    total: NDArray[np.int64]  # (q,)
    grades: Floats | None = None
    """(q, k) gain of each result; without it a hit gains 1."""
    ideal: Floats | None = None
    """(q, k) gains of the best ranking there could be: the query's grades, largest first, padded with 0."""


def relevance(
    query_labels: Sequence[object] | NDArray[np.generic],
    gallery_labels: Sequence[object] | NDArray[np.generic],
    ranking: NDArray[np.integer],
    exclude: NDArray[np.integer] | None = None,
) -> Relevance:
    """Marks the results of `ranking` (q, k) that have their query's label, and counts the relevant gallery items.

    With `exclude` (as in `ranking.rank`) a query's own item does not count as relevant.
    """
    query_codes, gallery_codes = _codes(query_labels, gallery_labels)
    padded = np.append(gallery_codes, -1)  # index -1, the padding, meets a label that no query has
    hits = padded[ranking] == query_codes[:, None]
    sizes = np.bincount(gallery_codes, minlength=query_codes.max(initial=-1) + 1)
    total = sizes[query_codes].astype(np.int64)
    if exclude is not None:
        total -= padded[exclude] == query_codes
    return Relevance(hits, total)


def tag_matrices(*sides: Sequence[Sequence[str]]) -> list[csr_array]:
    """For each side, n rows of several labels each: 1 where a row has a label, (n, labels of all sides)."""
    from scipy.sparse import csr_array

    known: dict[str, int] = {}
    codes = [[known.setdefault(tag, len(known)) for tags in side for tag in tags] for side in sides]
    return [
        csr_array(
            (np.ones(len(columns), np.int32), columns, np.append(0, np.cumsum([len(tags) for tags in side]))),
            (len(side), len(known)),
        )
        for side, columns in zip(sides, codes, strict=True)
    ]


def tag_relevance(
    query_tags: Sequence[Sequence[str]],
    gallery_tags: Sequence[Sequence[str]],
    ranking: NDArray[np.integer],
    exclude: NDArray[np.integer] | None = None,
) -> Relevance:
    """As `relevance`, where each query (q) and item (g) has several labels: one in common makes an item relevant."""
    queries, gallery = tag_matrices(query_tags, gallery_tags)
    items = gallery.T
    hits = np.zeros(ranking.shape, np.bool_)
    total = np.zeros(len(query_tags), np.int64)
    step = max(1, _CELLS // (len(gallery_tags) + 1))
    for start in range(0, len(query_tags), step):
        block = slice(start, start + step)
        shared = (queries[block] @ items).toarray() > 0
        shared = np.pad(shared, ((0, 0), (0, 1)))  # index -1, the padding, meets an item that shares nothing
        if exclude is not None:
            shared[np.arange(len(shared)), exclude[block]] = False
        hits[block] = np.take_along_axis(shared, ranking[block].astype(np.int64), axis=1)
        total[block] = shared.sum(axis=1)
    return Relevance(hits, total)


def graded_relevance(relevant: Sequence[Mapping[int, float]], ranking: NDArray[np.integer]) -> Relevance:
    """As `relevance`, where `relevant[i]` says how relevant gallery rows are to query i: row -> grade.

    Rows with a grade above 0 are relevant, all others have grade 0. A query's own item must not be among them. Raises
    ValueError for negative rows and for grades that are negative or not finite.
    """
    query = np.repeat(np.arange(len(relevant)), [len(of) for of in relevant])
    row = np.fromiter((row for of in relevant for row in of), np.int64, len(query))
    grade = np.fromiter((grade for of in relevant for grade in of.values()), np.float64, len(query))
    if (row < 0).any() or not np.isfinite(grade).all() or (grade < 0).any():
        raise ValueError("relevant items must be gallery rows from 0 on, each with a finite grade that is not negative")
    query, row, grade = query[grade > 0], row[grade > 0], grade[grade > 0]
    n, k = ranking.shape
    if len(relevant) != n:
        raise ValueError(f"{len(relevant)} queries have relevant items, but the ranking has {n}")
    # A query and a row as one number, in whose sorted list all results are found at once.
    width = max(row.max(initial=-1), ranking.max(initial=-1)) + 1
    order = np.argsort(query * width + row)
    key = (query * width + row)[order]
    sought = np.where(ranking >= 0, np.arange(n)[:, None] * width + ranking, -1)
    place = np.minimum(np.searchsorted(key, sought), max(0, len(key) - 1))
    hits = key[place] == sought if len(key) else np.zeros((n, k), np.bool_)
    grades = np.where(hits, grade[order][place], 0.0) if len(key) else np.zeros((n, k))
    total = np.bincount(query, minlength=n).astype(np.int64)
    best = np.lexsort((-grade, query))
    rank_of = np.arange(len(query)) - np.repeat(np.cumsum(total) - total, total)
    ideal = np.zeros((n, k))
    kept = rank_of < k
    ideal[query[best][kept], rank_of[kept]] = grade[best][kept]
    return Relevance(hits, total, grades, ideal)


def _codes(*labels: Sequence[object] | NDArray[np.generic]) -> list[NDArray[np.int64]]:
    """The same small integer for the same label, in all the sequences given."""
    known: dict[object, int] = {}
    return [
        np.array([known.setdefault(label, len(known)) for label in part], dtype=np.int64)
        for part in (part.tolist() if isinstance(part, np.ndarray) else part for part in labels)
    ]


def average_precision_at_k(found: Relevance, k: int) -> Floats:
    """AP@k of each query: the sum of precision@i over the hits i <= k, over min(k, relevant items). (q,)

    NaN where a query has no relevant item.
    """
    hits = found.hits[:, :k]
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return _divide((precision * hits).sum(axis=1), np.minimum(k, found.total))


def recall_at_k(found: Relevance, k: int) -> Floats:
    """R@k as in metric learning, a hit rate: 1 where a relevant item is among the first k, else 0. (q,)

    This is not the share of all relevant items found. NaN where a query has no relevant item.
    """
    return _of_those_with_relevant(found, found.hits[:, :k].sum(axis=1) > 0)


def precision_at_k(found: Relevance, k: int) -> Floats:
    """The share of relevant items among the first k, where missing results count as irrelevant. (q,)

    NaN where a query has no relevant item.
    """
    return _of_those_with_relevant(found, found.hits[:, :k].sum(axis=1) / k)


def ndcg_at_k(found: Relevance, k: int) -> Floats:
    """nDCG@k: the gains of the first k results, the i-th over log2(i + 1), over those of the best ranking. (q,)

    Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, ACM TOIS 20(4), 2002, section 2. The
    gain is the grade itself, as in trec_eval and scikit-learn, and 1 for a hit without grades. NaN where a query has no
    relevant item.
    """
    gains = found.hits[:, :k].astype(np.float64) if found.grades is None else found.grades[:, :k]
    if found.ideal is None:
        ideal = (np.arange(k) < found.total[:, None]).astype(np.float64)
    else:
        ideal = found.ideal[:, :k]
    # By element, not as a matrix product: then a ranking like the ideal one has exactly its sum.
    best = (ideal * _discount(ideal.shape[1])).sum(axis=1)
    return np.minimum(1.0, _divide((gains * _discount(gains.shape[1])).sum(axis=1), best))


def reciprocal_rank_at_k(found: Relevance, k: int) -> Floats:
    """1 over the rank of the first hit, 0 where none is among the first k. (q,)

    NaN where a query has no relevant item.
    """
    hits = found.hits[:, :k]
    return _of_those_with_relevant(found, hits.any(axis=1) / (1 + hits.argmax(axis=1)))


def _discount(k: int) -> Floats:
    return 1 / np.log2(np.arange(2, k + 2))


def _of_those_with_relevant(found: Relevance, values: NDArray[np.generic]) -> Floats:
    return np.where(found.total > 0, values.astype(np.float64), np.nan)


def _divide(numerator: Floats, denominator: NDArray[np.integer] | Floats) -> Floats:
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


METRICS: dict[str, Callable[[Relevance, int], Floats]] = {
    "map": average_precision_at_k,
    "recall": recall_at_k,
    "precision": precision_at_k,
    "ndcg": ndcg_at_k,
    "mrr": reciprocal_rank_at_k,
}
"""Of a ranking of k' answers and k <= k': a value for each query (q,), NaN where undefined."""


class Metric(NamedTuple):
    """A metric by its name, such as map@100."""

    name: str
    k: int

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"

    def per_query(self, found: Relevance) -> Floats:
        """The metric of each query, (q,); NaN marks queries without relevant items, which are excluded from means.

        Raises ValueError where the ranking is shorter than k.
        """
        if found.hits.shape[1] < self.k:
            raise ValueError(f"{self} needs rankings of {self.k} answers, these have {found.hits.shape[1]}")
        return METRICS[self.name](found, self.k)


def parse_metric(text: str) -> Metric:
    """The metric called `text`, such as "map@100" or "recall@1". Raises ValueError naming the known ones."""
    match = re.fullmatch(r"([a-z]+)@([1-9][0-9]{0,5})", text)
    if match is None or match[1] not in METRICS:
        near = difflib.get_close_matches(text.partition("@")[0], METRICS, n=1)
        advice = f'did you mean "{near[0]}@10"?' if near else "known are " + ", ".join(f"{name}@k" for name in METRICS)
        raise ValueError(f'unknown metric "{text}"; {advice}')
    return Metric(match[1], int(match[2]))


class Summary(NamedTuple):
    """The mean of a metric, and over how many queries."""

    mean: float
    """NaN where no query counts."""
    queries: int
    left_out: int
    """Queries without a relevant item."""

    @property
    def or_zero(self) -> float:
        """The mean, and 0 where no query counts, for JSON has no NaN."""
        return 0.0 if math.isnan(self.mean) else self.mean


def summarise(per_query: Floats) -> Summary:
    """The mean over the queries that have relevant items, (q,) -> Summary."""
    counted = per_query[~np.isnan(per_query)]
    mean = float(counted.mean()) if len(counted) else float("nan")
    return Summary(mean, len(counted), len(per_query) - len(counted))


def negative_flips(old: Relevance, new: Relevance) -> Floats:
    """1 for each query whose first result is relevant in `old` and irrelevant in `new`, else 0. (q,)

    NaN where a query has no relevant item. Yan et al., Positive-Congruent Training (arXiv 2011.09161, section 3).
    """
    flipped = old.hits[:, 0] & ~new.hits[:, 0]
    return np.where((old.total > 0) & (new.total > 0), flipped.astype(np.float64), np.nan)


def positive_flips(old: Relevance, new: Relevance) -> Floats:
    """1 for each query whose first result is irrelevant in `old` and relevant in `new`, else 0; NaN as before. (q,)"""
    return negative_flips(new, old)


def overlap_at_k(old_ranking: NDArray[np.integer], new_ranking: NDArray[np.integer], k: int) -> Floats:
    """The share of the first k answers that two rankings (q, k') of the same queries have in common. (q,)

    Where there are fewer than k answers (rows end in -1), the share of those; NaN where there are none. An order says
    nothing here. Raises ValueError for rankings of other queries or of fewer than k places.
    """
    if len(old_ranking) != len(new_ranking) or k < 1 or min(old_ranking.shape[1], new_ranking.shape[1]) < k:
        raise ValueError(
            f"rankings {old_ranking.shape} and {new_ranking.shape} must hold {k} answers of the same queries"
        )
    old, new = np.asarray(old_ranking)[:, :k], np.asarray(new_ranking)[:, :k]
    answers = np.sort(np.hstack([old, new]), axis=1)  # no ranking names an item twice: a pair is an item of both
    common = ((answers[:, 1:] == answers[:, :-1]) & (answers[:, 1:] >= 0)).sum(axis=1)
    return _divide(common.astype(np.float64), np.maximum((old >= 0).sum(axis=1), (new >= 0).sum(axis=1)))


def p_up(new_new: ArrayLike, best_best: ArrayLike) -> float:
    """How close the compatible encoder comes to an independently trained one; 0.5 is parity.

    Mean over datasets (n,) of sigmoid((M(n, n) - M(*, *)) / M(*, *)). M(*, *) must be above 0.
    """
    return float(np.mean(_up(new_new, best_best)))


def p_comp(new_old: ArrayLike, old_old: ArrayLike, best_best: ArrayLike) -> float:
    """How much of the possible gain the cross-test has without any backfill; 0.5 is parity with the old system.

    Mean over datasets (n,) of sigmoid((M(n, o) - M(o, o)) / (M(*, *) - M(o, o))). Look at the raw gains as well: the
    value says little where the independent encoder is hardly better than the old one. M(*, *) must be above M(o, o).
    """
    return float(np.mean(_comp(new_old, old_old, best_best)))


def p_1(new_new: ArrayLike, new_old: ArrayLike, old_old: ArrayLike, best_best: ArrayLike) -> float:
    """Mean over datasets (n,) of the harmonic mean of a dataset's terms of `p_up` and `p_comp`."""
    up, comp = _up(new_new, best_best), _comp(new_old, old_old, best_best)
    return float(np.mean(2 * up * comp / (up + comp)))


def _up(new_new: ArrayLike, best_best: ArrayLike) -> Floats:
    new, best = np.asarray(new_new, np.float64), np.asarray(best_best, np.float64)
    if (best <= 0).any():
        raise ValueError("P_up is undefined: the independent encoder's metric must be above 0")
    return _sigmoid((new - best) / best)


def _comp(new_old: ArrayLike, old_old: ArrayLike, best_best: ArrayLike) -> Floats:
    cross, old, best = (np.asarray(value, np.float64) for value in (new_old, old_old, best_best))
    if (best <= old).any():
        raise ValueError("P_comp is undefined: the independent encoder must be better than the old one")
    return _sigmoid((cross - old) / (best - old))


def _sigmoid(x: Floats) -> Floats:
    # Written with tanh, which does not overflow.
    return np.asarray(0.5 * (1 + np.tanh(x / 2)), np.float64)


def backfill_auc(fractions: ArrayLike, values: ArrayLike) -> float:
    """Area under the metric `values` (n,) over the re-embedded share of the gallery `fractions` (n,), by trapezoids.

    The shares rise from 0 to 1. Raises ValueError where they do not.
    """
    x, y = np.asarray(fractions, np.float64), np.asarray(values, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2 or x[0] != 0 or x[-1] != 1 or (np.diff(x) <= 0).any():
        raise ValueError("the backfill curve must have a value for each share, and shares that rise from 0 to 1")
    return float(np.trapezoid(y, x))
