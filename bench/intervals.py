"""Means with 95 % intervals, over seeds and over queries nested in seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and where it lies with 95 % confidence; without an interval (NaN) where one value was all there was."""

    mean: float
    low: float
    high: float


def over_seeds(values: ArrayLike) -> Interval:
    """Student's t over the seeds' values (s,): what another seed would give, data split and all."""
    from scipy.stats import t

    each = np.asarray(values, np.float64)
    mean = float(each.mean())
    if len(each) < 2:
        return Interval(mean, float("nan"), float("nan"))
    margin = float(t.ppf((1 + CONFIDENCE) / 2, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))
    return Interval(mean, mean - margin, mean + margin)


def over_queries(differences: Sequence[NDArray[np.floating]], *, resamples: int = 4000, seed: int = 0) -> Interval:
    """A percentile bootstrap of the mean over seeds of the mean over queries; one array (q,) of differences a seed.

    Seeds are drawn again, and in each drawn seed its queries: Davison and Hinkley, Bootstrap Methods and their
    Application (1997), section 3.8. The differences are paired: two encoders' metrics of the same query.
    """
    random = np.random.default_rng(seed)
    # A mean of queries drawn again, often enough for every place where its seed may be drawn.
    means = np.stack([resampled(values, resamples, random) for values in differences])  # (s, resamples)
    drawn = random.integers(0, len(means), size=(resamples, len(means)))
    # Where a seed is drawn twice, each time has queries of its own.
    columns = np.stack([random.permutation(resamples) for _ in range(len(means))], axis=1)
    totals = means[drawn, columns].mean(axis=1)
    low, high = np.quantile(totals, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.mean([values.mean() for values in differences])), float(low), float(high))


def resampled(values: NDArray[np.floating], resamples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Means of as many values, drawn again, (resamples,)."""
    drawn = random.integers(0, len(values), size=(resamples, len(values)), dtype=np.int32)
    return np.asarray(values, np.float64)[drawn].mean(axis=1)
