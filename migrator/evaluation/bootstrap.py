"""The confidence of a mean over queries: bootstrap over clusters of queries, interim analyses, and sample sizes.

Columns of values (q, m) hold one number for each query and each thing measured, such as the difference of a metric
between two searches; NaN where a query does not count. Paired by construction: the same queries are drawn for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DRAWS_PER_BLOCK = 1 << 20  # 24 MiB of draws, their counts, and the counts as floats
_MAX_QUERIES = 1_000_000


class Interval(NamedTuple):
    """A mean and its two-sided bootstrap interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float] | None:
        """For results; None where there is no interval, for JSON has no NaN."""
        return None if math.isnan(self.low) else self._asdict()


class BootstrapConfig(NamedTuple):
    """How a bootstrap is drawn."""

    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Means of the columns and how they vary when the clusters are drawn again; NaN where nothing can be said."""

    confidence: float
    means: Floats
    """(m,) over the queries that count."""
    error: Floats
    """(m,) standard errors of the means."""
    queries: NDArray[np.int64]
    """(m,) queries that count."""
    clusters: NDArray[np.int64]
    """(m,) clusters that they belong to. With fewer than 2 there is no error and no interval."""
    low: Floats = field(init=False)
    """(m,)"""
    high: Floats = field(init=False)
    """(m,)"""
    _resampled: Floats = field(repr=False)  # (resamples, m)
    _least: Floats = field(repr=False)  # (m,) of the values
    _greatest: Floats = field(repr=False)

    def __post_init__(self) -> None:
        bounds = np.array([self.interval(column)[1:] for column in range(len(self.means))]).reshape(-1, 2)
        object.__setattr__(self, "low", bounds[:, 0])
        object.__setattr__(self, "high", bounds[:, 1])

    def interval(self, column: int, confidence: float | None = None) -> Interval:
        """The mean of a column and its interval, at another `confidence` too. Raises ValueError for one beyond 0 to 1.

        The expanded percentile interval: Hesterberg, What Teachers Should Know About the Bootstrap (arXiv 1411.5279,
        2014; The American Statistician 69(4), 2015), section on expanded percentiles. Percentiles of n clusters drawn
        again lie too close together, by the root of (n - 1) / n and by a normal's quantiles in place of Student's t.
        And they end at the least of the resampled means, which few clusters or a thin tail soon reach: Student's t of
        the standard error is kept where it reaches further.
        """
        from scipy.special import ndtr, stdtrit

        mean, n = float(self.means[column]), int(self.clusters[column])
        confidence = self.confidence if confidence is None else confidence
        if not 0 < confidence < 1:
            raise ValueError(f"the confidence is {confidence}, must lie between 0 and 1")
        if n < 2:
            return Interval(mean, math.nan, math.nan)
        t = -float(stdtrit(n - 1, (1 - confidence) / 2))
        tail = float(ndtr(-math.sqrt(n / (n - 1)) * t))
        resampled = self._resampled[:, column]
        low, high = np.quantile(resampled[~np.isnan(resampled)], [tail, 1 - tail])
        margin = t * self.error[column]
        bounds = [min(low, mean - margin), max(high, mean + margin)]
        # No mean lies outside the data; rounding must not say so where all values are equal to a gate's bound.
        low, high = np.clip(bounds, self._least[column], self._greatest[column])
        return Interval(mean, float(low), float(high))


def bootstrap(
    values: Floats, clusters: NDArray[np.integer] | None = None, *, confidence: float, resamples: int, seed: int
) -> Bootstrap:
    """Draws whole clusters of queries again, with replacement: what other clusters of this kind might have given.

    values (q, m), NaN where a query does not count in a column. `clusters` (q,) holds the cluster of each query, such
    as its class, as any integers; without them each query is its own. A resample's mean is the ratio of the drawn
    clusters' sums to their counts: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 2.4
    and 3.8. One draw serves all columns. The same seed gives the same intervals. Memory is resamples x m and a block
    of 40 MiB, whatever q is.

    Raises ValueError for infinities and shapes that do not fit.
    """
    if values.ndim != 2 or (clusters is not None and clusters.shape != values.shape[:1]):
        raise ValueError(
            f"values {values.shape} must be (q, m), and clusters {None if clusters is None else clusters.shape} (q,)"
        )
    if np.isinf(values).any():
        raise ValueError("the bootstrap needs finite values, or NaN where a query does not count")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: must be at least 1")
    counted = ~np.isnan(values)
    somewhere = counted.any(axis=1)  # a query that counts nowhere is no draw
    values, counted = values[somewhere], counted[somewhere]
    filled = np.where(counted, values, 0.0)
    sums, sizes = filled, counted.astype(np.float64)
    if clusters is not None:
        codes = np.unique(clusters[somewhere], return_inverse=True)[1]
        sums, sizes = (_per_cluster(codes, part) for part in (sums, sizes))
    queries = counted.sum(axis=0)
    least = np.where(counted, values, np.inf).min(axis=0, initial=np.inf)
    greatest = np.where(counted, values, -np.inf).max(axis=0, initial=-np.inf)
    resampled = np.clip(_resampled_means(sums, sizes, resamples, seed), least, greatest)
    n = (sizes > 0).sum(axis=0)
    return Bootstrap(
        confidence=confidence,
        means=np.clip(_ratio(filled.sum(axis=0), queries), least, greatest),
        error=np.array([_error(resampled[:, column], int(of)) for column, of in enumerate(n)], np.float64),
        queries=queries,
        clusters=n,
        _resampled=resampled,
        _least=least,
        _greatest=greatest,
    )


def _per_cluster(codes: NDArray[np.integer], values: Floats) -> Floats:
    sums = np.zeros((codes.max(initial=-1) + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return sums


def _resampled_means(sums: Floats, sizes: Floats, resamples: int, seed: int) -> Floats:
    """Means (resamples, m) of clusters drawn again, from their sums and sizes (n, m); NaN where none counts."""
    n, m = sums.shape
    means = np.full((resamples, m), np.nan)
    if n == 0:
        return means
    random = np.random.default_rng(seed)
    both = np.hstack([sums, sizes])
    block = max(1, _DRAWS_PER_BLOCK // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(0, n, size=(rows, n))
        drawn += n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)  # each cluster was drawn
        total = times.astype(np.float64) @ both
        means[start : start + rows] = _ratio(total[:, :m], total[:, m:])
    return means


def _ratio(total: Floats, count: NDArray[np.integer] | Floats) -> Floats:
    ratio = np.full(total.shape, np.nan)
    np.divide(total, count, out=ratio, where=count > 0)
    return ratio


def _error(resampled: Floats, clusters: int) -> float:
    """How the resampled means spread, without the root of (n - 1) / n by which n clusters drawn again spread less."""
    resampled = resampled[~np.isnan(resampled)]
    if clusters < 2 or len(resampled) < 2:
        return math.nan
    return float(resampled.std(ddof=1)) * math.sqrt(clusters / (clusters - 1))


def exact_share(share: float, queries: int, confidence: float) -> Interval:
    """The interval of a share of `queries` independent queries, exact also where none or all of them count.

    A bootstrap sees no chance of what never happened: no case in 30 queries would prove that there are none. Clopper
    and Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, Biometrika 26(4),
    1934.
    """
    from scipy.stats import binomtest

    interval = binomtest(round(share * queries), queries).proportion_ci(confidence, method="exact")
    return Interval(share, float(interval.low), float(interval.high))


def interim_confidence(confidence: float, analysis: int) -> float:
    """The two-sided confidence of interim analysis 1, 2, ... at which all of them together err at most as agreed.

    Who verifies again and again until it passes, or measures after each run of a backfill, gets a lucky draw some day:
    at 95 % one analysis in twenty errs. So analysis k spends alpha / (k (k + 1)) of alpha = 1 - confidence; over all k
    these add up to alpha, and by Bonferroni's inequality no number of analyses, decided beforehand or not, errs with a
    greater probability. The idea of spending: Lan and DeMets, Discrete sequential boundaries for clinical trials,
    Biometrika 70(3), 1983. Raises ValueError for a number below 1.
    """
    if analysis < 1:
        raise ValueError(f"interim analysis {analysis}: they are counted from 1")
    return 1 - (1 - confidence) / (analysis * (analysis + 1))


def minimum_detectable(error: float, confidence: float, power: float = 0.8) -> float:
    """The true distance from a bound that a two-sided interval at `confidence` clears with probability `power`.

    `error` is the standard error, the result in its unit: (z of 1 - alpha/2 + z of power) x error. Cohen, Statistical
    Power Analysis for the Behavioral Sciences (1988), chapter 2. NaN for an error that is not known.
    """
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2) + ndtri(power)) * error


def queries_needed(queries: int, error: float, distance: float, confidence: float, power: float = 0.8) -> int | None:
    """How many queries like these, of as many more clusters, would decide a true `distance` from the bound.

    `error` is the standard error that `queries` queries gave; it shrinks with the root of their number. None where
    more than a million were needed, where the distance is 0, and where one of the numbers is not known.
    """
    if not (math.isfinite(error) and math.isfinite(distance)) or distance == 0:
        return None
    needed = queries * (minimum_detectable(error, confidence, power) / distance) ** 2
    return math.ceil(needed) if needed <= _MAX_QUERIES else None
