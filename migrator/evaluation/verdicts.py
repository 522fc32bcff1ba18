"""A verdict as text and states, from the results of a verification as the ledger keeps them; no arrays, no models.

`pass` of the gate has two states for people: `pass`, and `accepted`, where search is significantly worse than today
and the gate holds only because its own limits allow the loss. Results of earlier versions are read too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard

from migrator.formatting import is_number

Test: TypeAlias = Literal["cross", "lowest", "self"]
State: TypeAlias = Literal["pass", "accepted", "fail", "inconclusive"]

TITLES: dict[str, str] = {
    "cross": "cross-test",
    "lowest": "lowest point of the backfill",
    "self": "self-test",
}
"""What a finding's test is called."""
MOMENTS: dict[str, str] = {
    "cross": "at the canary",
    "lowest": "at the lowest point of the backfill",
    "self": "after the backfill",
}
"""When users meet what a test measures."""
BEFORE_TESTS = "the gate of the version that verified did not cover it"


def amount(difference: float) -> str:
    """The size of a difference: 0.049, and 0.00031 where three decimals would show nothing."""
    size = abs(difference)
    return f"{size:.3f}" if round(size, 3) else f"{size:.2g}"


def accepted_note(gain: float, bound: str, limit: float) -> str:
    """The note on a significant loss that a bound, such as min_gain, allows."""
    return f"worse by {amount(gain)}; accepted by your gate ({bound} {limit:g})"


def state_of(results: Mapping[str, Any]) -> State | None:
    """The state of a verification; None where the results hold no outcome."""
    outcome: State | None = results.get("outcome")
    return "accepted" if outcome == "pass" and losses(results) else outcome


def finding_state(finding: Mapping[str, Any]) -> State | None:
    """The state of one finding."""
    outcome: State | None = finding.get("outcome")
    return "accepted" if outcome == "pass" and _finding_note(finding) is not None else outcome


def losses(results: Mapping[str, Any]) -> list[str]:
    """The significant losses of a verification, each as `after the backfill: worse by 0.049; accepted by ...`."""
    findings = [finding for finding in results.get("findings") or [] if isinstance(finding, Mapping)]
    served = results.get("served") or "cross"
    found = [
        f"{_where(finding, served, results)}: {note}"
        for finding in findings
        if finding.get("outcome") == "pass" and (note := _finding_note(finding)) is not None
    ]
    return found + ([] if covers_tests(results) else _not_covered(results))


def covers_tests(results: Mapping[str, Any]) -> bool:
    """Whether the gate that made these results covered the canary, the backfill and the end state."""
    served = results.get("served") or "cross"
    tested = {finding.get("test") for finding in results.get("findings") or [] if isinstance(finding, Mapping)}
    return served == "self" or {"cross", "lowest", "self"} <= tested


def _where(finding: Mapping[str, Any], served: str, results: Mapping[str, Any]) -> str:
    test, metric, segment = finding.get("test") or served, finding.get("metric"), finding.get("segment")
    where = MOMENTS.get(str(test), str(test))
    if metric and metric != results.get("metric"):
        where += f", {metric}"
    return f"{where}, segment {segment!r}" if segment else where


def _finding_note(finding: Mapping[str, Any]) -> str | None:
    if "accepted" in finding:
        return str(finding.get("note")) if finding["accepted"] else None
    # Of an earlier version: its bound, such as "gain >= -0.05", and the interval tell as much.
    kind, _, limit = str(finding.get("bound") or "").partition(" >= ")
    interval = finding.get("interval")
    if kind != "gain" or not _is_loss(interval):
        return None
    try:
        return accepted_note(interval["mean"], "min_gain", float(limit))
    except ValueError:
        return None


def _not_covered(results: Mapping[str, Any]) -> list[str]:
    """Losses that an earlier version measured and its gate did not cover."""
    metric = results.get("metric") or "map@100"
    after = ((results.get("differences") or {}).get("self") or {}).get(metric)
    lowest = ((results.get("curve") or {}).get("lowest") or {}).get("gain")
    return [
        f"{MOMENTS[test]}: worse by {amount(interval['mean'])}; {BEFORE_TESTS}"
        for test, interval in (("lowest", lowest), ("self", after))
        if _is_loss(interval)
    ]


def _is_loss(interval: Any) -> TypeGuard[Mapping[str, float]]:
    """Whether a difference is significantly below zero."""
    return (
        isinstance(interval, Mapping)
        and is_number(interval.get("high"))
        and is_number(interval.get("mean"))
        and interval["high"] < 0
    )


def main_loss(results: Mapping[str, Any]) -> str | None:
    """The loss to show first: that of the end state, which stays, where there is one."""
    found = losses(results)
    return next((loss for loss in found if loss.startswith(MOMENTS["self"])), found[0] if found else None)


def summary(results: Mapping[str, Any]) -> str:
    """The verdict in one line: `accepted: after the backfill: worse by 0.049; accepted by ...`."""
    state = state_of(results)
    reasons: Sequence[str] = results.get("reasons") or []
    if state == "accepted":
        reasons = losses(results)
    elif state == "pass" and len(reasons) > 1:
        reasons = [f"each of the {len(reasons)} bounds holds"]
    return f"{state}: {'; '.join(map(str, reasons))}"
