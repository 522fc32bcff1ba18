"""The gate: a pure decision, from paired measurements to pass, fail or inconclusive, with reasons.

The interval is a paired percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): the same queries are asked of both systems, and whole queries are drawn again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from migrator.config import Gate

_DRAWS_PER_BLOCK = 1 << 20  # 12 MiB of indices and values
_MOST_QUERIES = 1_000_000


class Interval(NamedTuple):
    """A mean and its two-sided bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate decided, and why."""

    outcome: Literal["pass", "fail", "inconclusive"]
    reasons: tuple[str, ...]
    interval: Interval | None
    """Of the gain per query; None where there was nothing to measure."""
    queries: int


def paired_bootstrap(differences: NDArray[np.float64], *, confidence: float, resamples: int, seed: int) -> Interval:
    """The mean of `differences` (q,), new minus old per query, and its interval at `confidence` (0.95: 2.5 to 97.5 %).

    The same seed gives the same interval. Memory does not grow with `resamples` x q. Raises ValueError for no
    differences and for numbers that are not finite.
    """
    if differences.ndim != 1 or len(differences) == 0 or not np.isfinite(differences).all():
        raise ValueError("the bootstrap needs a row of finite differences")
    random = np.random.default_rng(seed)
    n = len(differences)
    means = np.empty(resamples)
    block = max(1, _DRAWS_PER_BLOCK // n)
    for start in range(0, resamples, block):
        drawn = random.integers(0, n, size=(min(block, resamples - start), n), dtype=np.int32)
        means[start : start + block] = differences[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    # No mean lies outside the data; rounding must not say so where all differences are equal to the gate's bound.
    bounds = differences.min(), differences.max()
    low, high = np.clip(np.quantile(means, [tail, 1 - tail]), *bounds)
    return Interval(float(np.clip(differences.mean(), *bounds)), float(low), float(high))


def gate(old: NDArray[np.float64], new: NDArray[np.float64], settings: Gate, *, seed: int = 0) -> Verdict:
    """Decides whether `new` (q,) gains at least `settings.min_gain` over `old` (q,), the metric of the same queries.

    Pass: the whole interval of the mean gain is at or above `min_gain`. Fail: all of it lies below. Everything else is
    inconclusive: an interval on both sides, fewer than `min_queries` queries, or values that are not finite (queries
    without relevant items must be left out before). Raises ValueError where the rows differ in length.
    """
    if old.ndim != 1 or old.shape != new.shape:
        raise ValueError(f"old {old.shape} and new {new.shape} must be rows of the same queries")
    queries = len(old)
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        reason = (
            f"the {settings.metric} of some queries is not a finite number: leave out queries without relevant items"
        )
        return Verdict("inconclusive", (reason,), None, queries)
    interval = None
    if queries:
        interval = paired_bootstrap(new - old, confidence=settings.confidence, resamples=settings.resamples, seed=seed)
    if interval is None or queries < settings.min_queries:
        reason = f"{queries} queries have relevant items, the gate needs {settings.min_queries}: add labelled queries"
        return Verdict("inconclusive", (reason,), interval, queries)
    measured = (
        f"{settings.metric} gain {interval.mean:+.4f}, between {interval.low:+.4f} and {interval.high:+.4f} "
        f"at {settings.confidence:.4g} confidence over {queries} queries"
    )
    if interval.low >= settings.min_gain:
        return Verdict("pass", (f"{measured}: at least {settings.min_gain:+.4f}",), interval, queries)
    if interval.high < settings.min_gain:
        return Verdict("fail", (f"{measured}: below {settings.min_gain:+.4f}",), interval, queries)
    advice = _advice(interval, settings.min_gain, queries)
    return Verdict(
        "inconclusive", (f"{measured}: on both sides of {settings.min_gain:+.4f}", advice), interval, queries
    )


def _advice(interval: Interval, min_gain: float, queries: int) -> str:
    """How many queries of the same mean and spread would decide: the interval shrinks with the root of their number."""
    distance = abs(interval.mean - min_gain)
    reach = interval.mean - interval.low if interval.mean >= min_gain else interval.high - interval.mean
    needed = math.ceil(queries * (reach / distance) ** 2) if distance > 0 else math.inf
    if needed > _MOST_QUERIES:
        return "the gain is too close to min_gain for any number of queries to decide: change min_gain or train longer"
    return f"about {max(needed, queries + 1)} queries like these would decide"
