"""The gate: a pure decision, from paired measurements to pass, fail or inconclusive, with reasons.

Each bound is one column of a bootstrap over the queries (`migrator.verify.statistics`): the same queries are asked of
both searches, and whole classes of them are drawn again. A bound holds where the whole interval does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from migrator.verify.statistics import (
    Bootstrap,
    Interval,
    bootstrap,
    exact_share,
    minimum_detectable,
    queries_needed,
    spent,
)

if TYPE_CHECKING:
    from migrator.config import Gate, Threshold

Floats: TypeAlias = NDArray[np.float64]
Outcome: TypeAlias = Literal["pass", "fail", "inconclusive"]

_EACH = "*"
_SHOWN = 40  # characters of a segment's name, which may be any text


@dataclass(frozen=True, slots=True)
class Measured:
    """What two searches gave for the same queries: metric -> value of each query (q,), NaN where it does not count."""

    old: Mapping[str, Floats]
    """Today's search, by names such as "map@100"."""
    new: Mapping[str, Floats]
    """The new search; `negative_flips` is here only."""
    clusters: NDArray[np.int64] | None = None
    """(q,) class of each query, where queries have classes."""
    segments: Sequence[str] | None = None
    """(q,) segment of each query, empty for none; None where `verify.segment` is not set."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One bound, and whether it holds."""

    metric: str
    bound: str
    """As text, such as "gain >= 0.02"."""
    segment: str | None
    """None for all queries."""
    outcome: Outcome
    interval: Interval | None
    """Of what is bounded; with a ratio, of the new value less that share of today's. None where there is none."""
    queries: int
    """Queries that count."""
    minimum_detectable: float | None
    """The least true distance from the bound that so many queries would probably have decided."""
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate decided, and why."""

    outcome: Outcome
    reasons: tuple[str, ...]
    """Of the findings that have the verdict's outcome."""
    interval: Interval | None
    """Of the first bound, the gain in `gate.metric`; None where there was too little to measure."""
    queries: int
    """That count in the first bound."""
    findings: tuple[Finding, ...]
    confidence: float
    """Of every interval, as `spent` gives it for this look."""
    look: int


@dataclass(frozen=True, slots=True)
class _Bound:
    metric: str
    kind: Literal["min", "max", "min_gain", "min_ratio"]
    given: float
    segment: str | None = None

    @property
    def text(self) -> str:
        what = {"min_gain": "gain", "min_ratio": "ratio"}.get(self.kind, "value")
        return f"{what} {'<=' if self.kind == 'max' else '>='} {self.given:g}"

    @property
    def what(self) -> str:
        """What the mean of `values` is called."""
        what = {"min_gain": " gain", "min_ratio": f" less {self.given:g} of today's"}.get(self.kind, "")
        return f"{_where(self.segment)}{self.metric}{what}"

    @property
    def limit(self) -> float:
        """What the mean of `values` must reach, or for `max` not pass."""
        return 0.0 if self.kind == "min_ratio" else self.given

    def values(self, measured: Measured) -> Floats:
        new = measured.new[self.metric]
        if self.kind == "min_gain":
            return new - measured.old[self.metric]
        return new - self.given * measured.old[self.metric] if self.kind == "min_ratio" else new

    def outcome(self, interval: Interval) -> Outcome:
        if self.kind == "max":
            right, wrong = interval.high <= self.limit, interval.low > self.limit
        else:
            right, wrong = interval.low >= self.limit, interval.high < self.limit
        return "pass" if right else "fail" if wrong else "inconclusive"

    def side(self, outcome: Outcome) -> str:
        sides = {"pass": "at least", "fail": "below", "inconclusive": "on both sides of"}
        if self.kind == "max":
            sides |= {"pass": "at most", "fail": "above"}
        return f"{sides[outcome]} {self.number(self.limit)}"

    def number(self, value: float) -> str:
        return f"{value:.4f}" if self.kind in ("min", "max") else f"{value:+.4f}"


def gate(measured: Measured, settings: Gate, *, look: int = 1, seed: int = 0) -> Verdict:
    """Decides whether the new search may take over: `settings.min_gain` in `settings.metric`, and every threshold.

    A bound passes where the whole interval is on its right side, and fails where all of it is on the wrong one. All
    else is inconclusive: an interval on both sides, fewer than `min_queries` queries that count, queries of one class
    only, values that are not finite or known for one search only, and segments that no query has. One failed bound
    fails the verdict; else one inconclusive bound makes it inconclusive. `look` is the number of the look at such data
    (`spent`). Raises ValueError where rows differ in length or a metric was not measured.
    """
    bounds = [_Bound(settings.metric, "min_gain", settings.min_gain)]
    for threshold in settings.thresholds:
        bounds += _bounds(threshold, measured.segments)
    columns = np.full((_queries(measured, bounds), len(bounds)), np.nan)
    problems = []
    for column, bound in enumerate(bounds):
        here = _members(bound.segment, measured.segments, len(columns))
        problems.append(_problem(bound, measured, here))
        if problems[-1] is None:
            columns[here, column] = bound.values(measured)[here]
    confidence = spent(settings.confidence, look)
    drawn = bootstrap(
        columns,
        measured.clusters if settings.cluster == "class" else None,
        confidence=confidence,
        resamples=settings.resamples,
        seed=seed,
    )
    asked = _Asked(
        least=settings.min_queries,
        classes=settings.cluster == "class" and measured.clusters is not None,
        at=f"at {confidence:.6g} confidence" + (f" (look {look})" if look > 1 else ""),
    )
    findings = tuple(
        _none(bound, problem) if problem else _finding(bound, columns[:, column], drawn, column, asked)
        for column, (bound, problem) in enumerate(zip(bounds, problems, strict=True))
    )
    outcomes = {finding.outcome for finding in findings}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    return Verdict(
        outcome=outcome,
        reasons=tuple(finding.reason for finding in findings if finding.outcome == outcome),
        interval=findings[0].interval,
        queries=findings[0].queries,
        findings=findings,
        confidence=confidence,
        look=look,
    )


def _bounds(threshold: Threshold, segments: Sequence[str] | None) -> list[_Bound]:
    """A threshold's bound, for each segment that there is where it is for all of them."""
    kinds: tuple[Literal["min", "max", "min_gain", "min_ratio"], ...] = ("min", "max", "min_gain", "min_ratio")
    (kind,) = (kind for kind in kinds if getattr(threshold, kind) is not None)
    each: list[str | None] = [threshold.segment]
    if threshold.segment == _EACH:
        each = [*sorted(set(segments or ()) - {""})] or [_EACH]  # without segments one bound is left, to be told of
    return [_Bound(threshold.metric, kind, getattr(threshold, kind), segment) for segment in each]


def _queries(measured: Measured, bounds: Sequence[_Bound]) -> int:
    """How many were asked. Raises ValueError where the rows differ in length or one is missing."""
    rows = [values for side in (measured.old, measured.new) for values in side.values()]
    lengths = {values.shape for values in rows}
    lengths |= {of.shape for of in (measured.clusters,) if of is not None}
    lengths |= {(len(of),) for of in (measured.segments,) if of is not None}
    missing = {bound.metric for bound in bounds} - measured.new.keys()
    missing |= {bound.metric for bound in bounds if bound.kind in ("min_gain", "min_ratio")} - measured.old.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} must be measured for both searches")
    if len(lengths) != 1 or any(values.ndim != 1 for values in rows):
        raise ValueError(f"metrics, clusters and segments must be rows of the same queries, these are {lengths}")
    return len(rows[0])


def _members(segment: str | None, segments: Sequence[str] | None, queries: int) -> NDArray[np.bool_]:
    if segment is None:
        return np.ones(queries, np.bool_)
    return np.fromiter((of == segment for of in segments or [""] * queries), np.bool_, queries)


def _where(segment: str | None) -> str:
    if segment is None:
        return ""
    return f"segment {segment[:_SHOWN]!r}{'…' if len(segment) > _SHOWN else ''}: "


def _problem(bound: _Bound, measured: Measured, here: NDArray[np.bool_]) -> str | None:
    """Why nothing can be said of a bound's values."""
    if bound.segment is not None and not here.any():
        if measured.segments is None:
            return f"{_where(bound.segment)}queries have no segments: set verify.segment"
        known = [_where(segment).removeprefix("segment ").removesuffix(": ") for segment in {*measured.segments} - {""}]
        return f"{_where(bound.segment)}no query is in it; there are {', '.join(sorted(known)[:10]) or 'none'}"
    new = measured.new[bound.metric][here]
    old = measured.old[bound.metric][here] if bound.metric in measured.old else new
    broken = int((np.isinf(new) | np.isinf(old) | (np.isnan(new) != np.isnan(old))).sum())
    if broken:
        return (
            f"{_where(bound.segment)}the {bound.metric} of {broken} queries is not a finite number for both searches: "
            "leave such queries out of both"
        )
    return None


def _none(bound: _Bound, reason: str) -> Finding:
    return Finding(bound.metric, bound.text, bound.segment, "inconclusive", None, 0, None, reason)


@dataclass(frozen=True, slots=True)
class _Asked:
    least: int
    """Queries."""
    classes: bool
    """Whether they were drawn again by class."""
    at: str
    """The confidence, in words."""


def _finding(bound: _Bound, values: Floats, drawn: Bootstrap, column: int, asked: _Asked) -> Finding:
    queries, classes, error = int(drawn.queries[column]), int(drawn.clusters[column]), float(drawn.error[column])
    interval: Interval | None = None
    outcome: Outcome = "inconclusive"
    detectable: float | None = None
    if classes > 1:
        interval = drawn.interval(column)
        counted = values[~np.isnan(values)]
        if bound.kind in ("min", "max") and np.isin(counted, (0, 1)).all():
            interval, error = _share(interval, error, queries, drawn.confidence)
        detectable = minimum_detectable(error, drawn.confidence)
    if queries < asked.least:
        reason = (
            f"{_where(bound.segment)}{queries} queries have relevant items, the gate needs {asked.least}: "
            "add labelled queries"
        )
    elif interval is None:
        reason = (
            f"{_where(bound.segment)}all {queries} queries are of one class: add queries of other classes, or set "
            "verify.gate.cluster to query"
        )
    else:
        outcome = bound.outcome(interval)
        mean, low, high = (bound.number(value) for value in interval)
        of = f"{queries} queries" + (f" of {classes} classes" if asked.classes else "")
        reason = f"{bound.what} {mean}, between {low} and {high} {asked.at} over {of}: {bound.side(outcome)}"
        if outcome == "inconclusive":
            distance = abs(interval.mean - bound.limit)
            needed = queries_needed(queries, error, distance, drawn.confidence)
            reason += (
                f"; so many queries would find a distance of {detectable:.4f} from it in four cases of five; "
                + _advice(needed, queries, classes if asked.classes else None, bound.kind)
            )
    return Finding(bound.metric, bound.text, bound.segment, outcome, interval, queries, detectable, reason)


def _share(interval: Interval, error: float, queries: int, confidence: float) -> tuple[Interval, float]:
    """The interval and standard error of a share, at least as wide as if the queries were independent.

    What never happened in the sample never happens in a resample: without this 30 queries, none of them turned wrong,
    would prove that none ever does.
    """
    exact = exact_share(interval.mean, queries, confidence)
    likely = (interval.mean * queries + 1) / (queries + 2)  # Laplace's rule of succession: neither 0 nor 1
    return (
        Interval(interval.mean, min(interval.low, exact.low), max(interval.high, exact.high)),
        max(error, math.sqrt(likely * (1 - likely) / queries)),
    )


def _advice(needed: int | None, queries: int, classes: int | None, kind: str) -> str:
    if needed is None:
        return f"it is too close to {kind} for any number of queries to decide: change {kind} or train longer"
    needed = max(needed, queries + 1)
    more = "" if classes is None else f", of about {math.ceil(needed * classes / queries)} classes,"
    return f"about {needed} queries like these{more} would decide"
