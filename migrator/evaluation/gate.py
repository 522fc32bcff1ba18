"""The gate: a pure decision, from paired measurements to pass, fail or inconclusive, with reasons.

Each bound is a column of a bootstrap over the queries (`migrator.evaluation.bootstrap`), in `lowest` one for each share
of the backfill: the same queries are put to both searches, and whole classes of them are resampled. A bound holds where
the whole interval does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from migrator.evaluation.bootstrap import (
    Bootstrap,
    Interval,
    bootstrap,
    exact_share,
    interim_confidence,
    minimum_detectable,
    queries_needed,
)
from migrator.evaluation.verdicts import TITLES, Test, accepted_note

if TYPE_CHECKING:
    from migrator.config import Gate, Threshold

Floats: TypeAlias = NDArray[np.float64]
Outcome: TypeAlias = Literal["pass", "fail", "inconclusive"]
Kind: TypeAlias = Literal["min", "max", "min_gain", "min_ratio"]

_EACH = "*"
_MAX_SHOWN = 40  # characters of a segment's name, which may be any text


@dataclass(frozen=True, slots=True)
class Measured:
    """What searches gave for the same queries: metric -> value of each query (q,), NaN where it does not count."""

    old: Mapping[str, Floats]
    """Today's search, by names such as "map@100"."""
    new: Mapping[str, Floats]
    """The new search in the test that is `served`; `negative_flips` is on the new side only."""
    clusters: NDArray[np.int64] | None = None
    """(q,) class of each query, where queries have classes."""
    segments: Sequence[str] | None = None
    """(q,) segment of each query, empty for none; None where `verify.segment` is not set."""
    served: Test = "cross"
    """The test that queries meet first."""
    others: Mapping[Test, Mapping[str, Floats]] = field(default_factory=dict)
    """The new search in other tests; in `lowest` (s, q), a row for each share of the backfill."""
    default_tests: tuple[Test, ...] = ()
    """The tests that `min_gain` bounds; empty for the served one alone."""
    shares: Sequence[float] = ()
    """(s,) shares of the backfill, of the rows of `lowest`."""

    def of(self, test: Test) -> Mapping[str, Floats] | None:
        """The new search in a test; None where it was not measured."""
        return self.new if test == self.served else self.others.get(test)


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
    """Minimum detectable effect at 80 % power: the true distance from the bound that this many queries decide."""
    reason: str
    test: Test = "cross"
    accepted: bool = False
    """It passes, and search is significantly worse than today: the bound itself allows the loss."""
    note: str | None = None
    """Of an accepted loss: "worse by 0.049; accepted by your gate (min_gain -0.05)"."""
    gain: Interval | None = None
    """Of the difference from today's search; None for `negative_flips`, and where there is none."""
    share: float | None = None
    """In `lowest`, the share of the backfill at which the mean is lowest."""
    queries_needed: int | None = None
    """Of an inconclusive bound: judged queries that decide it at the next interim analysis, with 80 % power, if the
    true value is the mean. None where there is no such number."""


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
    """Of every interval: as `interim_confidence` gives it, corrected for the number of default tests."""
    analysis: int

    @property
    def accepted(self) -> bool:
        """Whether it passes with a significant loss that its bounds allow."""
        return self.outcome == "pass" and any(finding.accepted for finding in self.findings)


@dataclass(frozen=True, slots=True)
class _Bound:
    metric: str
    kind: Kind
    given: float
    test: Test
    segment: str | None = None

    @property
    def text(self) -> str:
        what = {"min_gain": "gain", "min_ratio": "ratio"}.get(self.kind, "value")
        return f"{what} {'<=' if self.kind == 'max' else '>='} {self.given:g}"

    @property
    def what(self) -> str:
        """What the mean of `values` is called."""
        what = {"min_gain": " gain", "min_ratio": f" less {self.given:g} of today's"}.get(self.kind, "")
        return f"{self.metric}{what}"

    @property
    def limit(self) -> float:
        """What the mean of `values` must reach, or for `max` not pass."""
        return 0.0 if self.kind == "min_ratio" else self.given

    def values(self, old: Floats, new: Floats) -> Floats:
        """Of what is bounded, from values of one shape."""
        if self.kind == "min_gain":
            return new - old
        return new - self.given * old if self.kind == "min_ratio" else new

    def outcome(self, interval: Interval) -> Outcome:
        if self.kind == "max":
            holds, violated = interval.high <= self.limit, interval.low > self.limit
        else:
            holds, violated = interval.low >= self.limit, interval.high < self.limit
        return "pass" if holds else "fail" if violated else "inconclusive"

    def side(self, outcome: Outcome) -> str:
        sides = {"pass": "at least", "fail": "below", "inconclusive": "on both sides of"}
        if self.kind == "max":
            sides |= {"pass": "at most", "fail": "above"}
        return f"{sides[outcome]} {self.number(self.limit)}"

    def number(self, value: float) -> str:
        return f"{value:.4f}" if self.kind in ("min", "max") else f"{value:+.4f}"


def gate(measured: Measured, settings: Gate, *, analysis: int = 1, seed: int = 0) -> Verdict:
    """Decides whether the new search may take over: `min_gain` in each default test, and every threshold.

    A bound passes where it holds for the whole interval, and fails where it holds for no part of it. All
    else is inconclusive: an interval on both sides, fewer than `min_queries` queries that count, queries of one class
    only, values that are not finite or known for one search only, tests that were not measured, and segments that no
    query has. One failed bound fails the verdict; else one inconclusive bound makes it inconclusive.

    `analysis` is the number of the interim analysis (`interim_confidence`). What it may err is shared equally by the
    default tests, by
    Bonferroni's inequality, and the confidence that results is that of every interval.

    The lowest point is chosen by the data, so its interval covers the choice. Its lower end is the lowest of the lower
    ends of all shares: to be above a limit everywhere, each share must be (an intersection-union test: Berger,
    Multiparameter Hypothesis Testing and Acceptance Sampling, Technometrics 24(4), 1982), which errs no more than one
    share. Its upper end is the lowest of the upper ends, each at a confidence corrected for the number of shares.

    Raises ValueError where rows differ in length, or a metric or a default test was not measured.
    """
    defaults = measured.default_tests or (measured.served,)
    bounds = [_Bound(settings.metric, "min_gain", settings.least_gain(test), test) for test in defaults]
    for threshold in settings.thresholds:
        bounds += _bounds(threshold, measured)
    queries = _queries(measured, bounds, defaults)
    problems = [_problem(bound, measured, _members(bound.segment, measured.segments, queries)) for bound in bounds]
    blocks = [
        [] if problem else _blocks(bound, measured, _members(bound.segment, measured.segments, queries))
        for bound, problem in zip(bounds, problems, strict=True)
    ]
    rows = [row for block in blocks for values in block for row in values]

    def confidence(number: int) -> float:
        """Of interim analysis `number`, shared by the default tests."""
        return 1 - (1 - interim_confidence(settings.confidence, number)) / len(defaults)

    drawn = bootstrap(
        np.stack(rows, axis=1) if rows else np.full((queries, 0), np.nan),
        measured.clusters if settings.cluster == "class" else None,
        confidence=confidence(analysis),
        resamples=settings.resamples,
        seed=seed,
    )
    judge = _Judge(
        min_queries=settings.min_queries,
        classes=settings.cluster == "class" and measured.clusters is not None,
        at=f"at {drawn.confidence:.6g} confidence" + (f" (interim analysis {analysis})" if analysis > 1 else ""),
        several=bool(measured.others),
        shares=measured.shares,
        drawn=drawn,
        next_confidence=confidence(analysis + 1),
    )
    findings = []
    at = 0
    for bound, problem, block in zip(bounds, problems, blocks, strict=True):
        columns = [range(at := at + len(values))[-len(values) :] for values in block]
        findings.append(_none(bound, judge.where(bound) + problem) if problem else judge.finding(bound, block, columns))
    outcomes = {finding.outcome for finding in findings}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    return Verdict(
        outcome=outcome,
        reasons=tuple(finding.reason for finding in findings if finding.outcome == outcome),
        interval=findings[0].interval,
        queries=findings[0].queries,
        findings=tuple(findings),
        confidence=drawn.confidence,
        analysis=analysis,
    )


def _bounds(threshold: Threshold, measured: Measured) -> list[_Bound]:
    """A threshold's bound, for each segment that there is where it is for all of them."""
    kinds: tuple[Kind, ...] = ("min", "max", "min_gain", "min_ratio")
    (kind,) = (kind for kind in kinds if getattr(threshold, kind) is not None)
    each: list[str | None] = [threshold.segment]
    if threshold.segment == _EACH:  # without segments one bound stays, which then says so
        each = [*sorted(set(measured.segments or ()) - {""})] or [_EACH]
    test = threshold.test or measured.served
    return [_Bound(threshold.metric, kind, getattr(threshold, kind), test, segment) for segment in each]


def _queries(measured: Measured, bounds: Sequence[_Bound], defaults: Sequence[Test]) -> int:
    """How many there are. Raises ValueError where the rows differ in length or one is missing."""
    rows = [values for side in (measured.old, measured.new) for values in side.values()]
    for test, other in measured.others.items():
        rows += [row for values in other.values() for row in (values if test == "lowest" else [values])]
    lengths = {values.shape for values in rows}
    lengths |= {of.shape for of in (measured.clusters,) if of is not None}
    lengths |= {(len(of),) for of in (measured.segments,) if of is not None}
    known = {bound.test: measured.of(bound.test) for bound in bounds}
    missing = {bound.metric for bound in bounds if (side := known[bound.test]) is not None and bound.metric not in side}
    missing |= {bound.metric for bound in bounds if bound.kind in ("min_gain", "min_ratio")} - measured.old.keys()
    missing |= {f"the {TITLES[test]}" for test in defaults if known[test] is None}
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} must be measured for both searches")
    if len(lengths) != 1 or any(values.ndim != 1 for values in rows):
        raise ValueError(f"metrics, clusters and segments must be rows of the same queries, these are {lengths}")
    return len(rows[0])


def _rows(bound: _Bound, measured: Measured) -> tuple[Floats | None, Floats]:
    """Today's values (q,), None for `negative_flips`, and the new ones (s, q), a row for each share of `lowest`."""
    side = measured.of(bound.test)
    assert side is not None
    return measured.old.get(bound.metric), np.atleast_2d(side[bound.metric])


def _blocks(bound: _Bound, measured: Measured, here: NDArray[np.bool_]) -> list[Floats]:
    """What is bounded (s, q), NaN outside the segment; and the gain over today (s, q), where that is something else."""
    old, new = _rows(bound, measured)
    new = np.where(here, new, np.nan)
    blocks = [bound.values(new if old is None else old, new)]
    if old is not None and bound.kind != "min_gain":
        blocks.append(new - old)
    return blocks


def _members(segment: str | None, segments: Sequence[str] | None, queries: int) -> NDArray[np.bool_]:
    if segment is None:
        return np.ones(queries, np.bool_)
    return np.fromiter((of == segment for of in segments or [""] * queries), np.bool_, queries)


def _where(segment: str | None) -> str:
    if segment is None:
        return ""
    return f"segment {segment[:_MAX_SHOWN]!r}{'…' if len(segment) > _MAX_SHOWN else ''}: "


def _problem(bound: _Bound, measured: Measured, here: NDArray[np.bool_]) -> str | None:
    """Why nothing can be said of a bound's values."""
    if measured.of(bound.test) is None:
        return f"it was not measured for this strategy and these vectors: name another test than {bound.test}"
    if bound.segment is not None and not here.any():
        if measured.segments is None:
            return f"{_where(bound.segment)}queries have no segments: set verify.segment"
        known = [_where(segment).removeprefix("segment ").removesuffix(": ") for segment in {*measured.segments} - {""}]
        return f"{_where(bound.segment)}no query is in it; there are {', '.join(sorted(known)[:10]) or 'none'}"
    before, new = _rows(bound, measured)
    new = new[:, here]
    old = new if before is None else np.broadcast_to(before[here], new.shape)
    broken = int((np.isinf(new) | np.isinf(old) | (np.isnan(new) != np.isnan(old))).any(axis=0).sum())
    if broken:
        return (
            f"{_where(bound.segment)}the {bound.metric} of {broken} queries is not a finite number for both searches: "
            "remove such queries from both"
        )
    return None


def _none(bound: _Bound, reason: str) -> Finding:
    return Finding(bound.metric, bound.text, bound.segment, "inconclusive", None, 0, None, reason, bound.test)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Makes findings of what was drawn."""

    min_queries: int
    classes: bool
    """Whether whole classes were drawn."""
    at: str
    """The confidence, as text."""
    several: bool
    """Whether several tests were measured, so that each finding must name its own."""
    shares: Sequence[float]
    drawn: Bootstrap
    next_confidence: float
    """More queries are another query set, and thereby a further interim analysis."""

    def where(self, bound: _Bound, share: float | None = None) -> str:
        at = "" if share is None else f" ({share:.0%})"
        return f"{TITLES[bound.test]}{at}: " if self.several else ""

    def finding(self, bound: _Bound, block: Sequence[Floats], columns: Sequence[range]) -> Finding:
        """Of what is bounded, and of the gain where that has columns of its own."""
        confidence = self.drawn.confidence
        worst = self._worst(bound, columns[0])
        queries, classes = int(self.drawn.queries[worst]), int(self.drawn.clusters[worst])
        error = float(self.drawn.error[worst])
        share = self.shares[worst - columns[0].start] if bound.test == "lowest" and self.shares else None
        where = self.where(bound, share) + _where(bound.segment)
        interval = gain = detectable = needed = None
        outcome: Outcome = "inconclusive"
        if classes > 1:
            counted = block[0][:, ~np.isnan(block[0]).all(axis=0)]
            shares = bound.kind in ("min", "max") and bool(np.isin(counted, (0, 1)).all())
            interval = self._interval(bound.kind, columns[0], exact=shares)
            gain = interval if bound.kind == "min_gain" else self._gain(columns)
            if shares:
                error = _share_error(float(self.drawn.means[worst]), error, queries)
            detectable = minimum_detectable(error, confidence)
        if queries < self.min_queries:
            needed = self.min_queries
            reason = (
                f"{where}{queries} queries have relevant items, the gate needs {self.min_queries}: add labelled queries"
            )
        elif interval is None:
            reason = (
                f"{where}all {queries} queries are of one class: add queries of other classes, or set "
                "verify.gate.cluster to query"
            )
        else:
            outcome = bound.outcome(interval)
            mean, low, high = (bound.number(value) for value in interval)
            of = f"{queries} queries" + (f" of {classes} classes" if self.classes else "")
            reason = f"{where}{bound.what} {mean}, between {low} and {high} {self.at} over {of}: {bound.side(outcome)}"
            if outcome == "inconclusive":
                assert detectable is not None
                needed = queries_needed(queries, error, abs(interval.mean - bound.limit), self.next_confidence)
                needed = needed and max(needed, queries + 1)
                reason += f"; minimum detectable effect at 80 % power: {detectable:.4f}; " + _advice(
                    needed, queries, classes if self.classes else None, bound.kind
                )
        accepted = outcome == "pass" and gain is not None and gain.high < 0
        note = accepted_note(gain.mean, bound.kind, bound.given) if accepted and gain is not None else None
        return Finding(
            bound.metric, bound.text, bound.segment, outcome, interval, queries, detectable,
            reason if note is None else f"{reason}; {note}", bound.test, accepted, note, gain, share, needed,
        )  # fmt: skip

    def _worst(self, bound: _Bound, columns: range) -> int:
        """The column, of the shares of the backfill, that is worst in what is bounded."""
        means = self.drawn.means[columns.start : columns.stop]
        if np.isnan(means).all():
            return columns.start
        return columns.start + int(np.nanargmax(means) if bound.kind == "max" else np.nanargmin(means))

    def _gain(self, columns: Sequence[range]) -> Interval | None:
        return self._interval("min_gain", columns[1]) if len(columns) > 1 else None

    def _interval(self, kind: Kind, columns: range, *, exact: bool = False) -> Interval:
        """Of one column, or of the worst of several: see `gate`."""
        near = self.drawn.confidence
        far = 1 - (1 - near) / len(columns)
        ends = [
            [self._one(column, confidence, exact=exact) for column in columns]
            for confidence in ((far, near) if kind == "max" else (near, far))
        ]
        worst = max if kind == "max" else min
        return Interval(
            worst(each.mean for each in ends[0]),
            worst(each.low for each in ends[0]),
            worst(each.high for each in ends[1]),
        )

    def _one(self, column: int, confidence: float, *, exact: bool) -> Interval:
        """Of one column. Of a share at least as wide as if the queries were independent.

        What never happened in the sample never happens in a resample: without this 30 queries, none of them a flip,
        would prove that there are none.
        """
        found = self.drawn.interval(column, confidence)
        if not exact:
            return found
        alone = exact_share(found.mean, int(self.drawn.queries[column]), confidence)
        return Interval(found.mean, min(found.low, alone.low), max(found.high, alone.high))


def _share_error(share: float, error: float, queries: int) -> float:
    """The standard error of a share, at least that of independent queries by Laplace's rule of succession, whose
    share is neither 0 nor 1."""
    likely = (share * queries + 1) / (queries + 2)
    return max(error, math.sqrt(likely * (1 - likely) / queries))


def _advice(needed: int | None, queries: int, classes: int | None, kind: str) -> str:
    if needed is None:
        return f"it is too close to {kind} for any number of queries to decide: change {kind} or train longer"
    more = "" if classes is None else f", of about {math.ceil(needed * classes / queries)} classes,"
    return f"about {needed} queries like these{more} would decide"
