"""The verdict as text: may the new encoder answer queries, by how much better, with what confidence, and what gets
worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migrator.evaluation.verdicts import losses, main_loss
from migrator.formatting import is_number, metric_name, number, percent, sanitized, sentence, signed
from migrator.lifecycle.strategy import STRATEGIES

_MEANING = {
    "map": "1 means that every relevant item comes before every irrelevant one",
    "recall": "1 means that every query finds a relevant item",
    "precision": "1 means that all results are relevant",
    "ndcg": "1 means that the best results come first",
    "mrr": "1 means that the first result is always relevant",
}
_TILES = {"cross": "canary", "lowest": "lowest of the backfill", "self": "after the backfill"}


def is_moved(status: Mapping[str, Any]) -> bool:
    """Whether every query is with the new encoder, so that a verification is behind the migration, however old."""
    return status["strategy"] is not None and status["stage"] in STRATEGIES[status["strategy"]].moved_stages


def meaning(metric: str) -> str:
    """What a value of a metric says."""
    return _MEANING.get(metric.partition("@")[0], "1 is perfect")


def verdict(facts: Mapping[str, Any]) -> dict[str, Any]:
    """From the other facts: `answer` (yes, accepted, no, open or back), a `headline`, `sentences` with the reasons, the
    `next_steps` where it did not pass, and `tiles`: today's search, and the new one at each point that users meet.

    `accepted` is a yes to a search that is worse than today's, by leave of the gate.
    """
    answer, headline = _headline(facts)
    verification = facts["verification"]
    sentences = [] if verification is None else _evidence(verification)
    return {
        "answer": answer,
        "headline": headline,
        "sentences": [*sentences, *_during_backfill(facts)],
        "next_steps": [sanitized(str(step)) for step in facts["status"].get("next_steps") or []],
        "tiles": [] if verification is None else tiles(verification["results"]),
    }


def tiles(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`title`, `value`, and where known the `gain` over today (mean, low, high) and `state`: better, same or worse."""
    metric, served = results.get("metric") or "map@100", results.get("served") or "cross"
    tests, lowest = results.get("tests") or {}, (results.get("curve") or {}).get("lowest") or {}
    values = {test: (tests.get(test) or {}).get(metric) for test in ("cross", "self")} | {"lowest": lowest.get("value")}
    found: list[dict[str, Any]] = [{"title": "today", "value": (tests.get("baseline") or {}).get(metric)}]
    for test in ("cross", "lowest", "self") if served == "cross" else ("self",):
        gain = _gain_in(results, test, metric)
        state = "worse" if gain and gain["high"] < 0 else "better" if gain and gain["low"] > 0 else "same"
        title = _TILES[test]
        if test == "lowest" and is_number(lowest.get("share")):
            title += f" ({percent(lowest['share'])})"
        found.append({"title": title, "value": values[test], "gain": gain, "state": state if gain else None})
    return [tile for tile in found if is_number(tile["value"])]


def _gain_in(results: Mapping[str, Any], test: str, metric: str) -> dict[str, float] | None:
    """The difference from today as the gate had it; of an earlier version as it was measured."""
    findings = results.get("findings") or []
    gains = [
        at.get("gain")
        for at in findings
        if (at.get("test"), at.get("metric"), at.get("segment")) == (test, metric, None)
    ]
    if test == "lowest":
        gains.append(((results.get("curve") or {}).get("lowest") or {}).get("gain"))
    else:
        gains.append(((results.get("differences") or {}).get(test) or {}).get(metric))
    known = (gain for gain in gains if gain and all(is_number(gain.get(end)) for end in ("mean", "low", "high")))
    return next(known, None)


def _during_backfill(facts: Mapping[str, Any]) -> list[str]:
    sentences = []
    value, read_back = last_with(facts, "value"), last_with(facts, "read_back")
    if value is not None and is_number(value["value"]):
        sentences.append(
            f"When it was last measured, with {percent(value.get('share'))} of the collection re-embedded, search "
            f"scored {number(value['value'])}."
        )
    if read_back is not None and read_back["read_back"].get("mismatched"):
        sentences.append(
            f"Of {read_back['read_back'].get('checked', '?')} items that were read back after the last run, "
            f"{read_back['read_back']['mismatched']} did not hold the vector that the new encoder gives for their "
            "image."
        )
    return sentences


def last_with(facts: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The newest measurement of the collection that has a `key`."""
    return next((entry for entry in reversed(facts["measured"]) if entry.get(key) is not None), None)


def _headline(facts: Mapping[str, Any]) -> tuple[str, str]:
    status, verification, last = facts["status"], facts["verification"], last_with(facts, "outcome")
    name, state = status["migration"], status["state"]
    if state == "rolled_back":
        return "back", "Rolled back: the old encoder answers every query again."
    if state == "rolling_back":
        return "back", "Rolling back: the old vectors are being restored."
    results = {} if verification is None else verification["results"]
    loss = main_loss(results) if results.get("outcome") == "pass" else None
    if state == "finished":
        if loss is not None:
            return "accepted", f"Done. {sentence(sanitized(loss))}"
        return "yes", "Done: the new encoder answers every query."
    if last is not None and last["outcome"] == "below the gate":
        return "no", "Stop: when it was last measured, search was below the gate."
    if verification is None:
        if status["new_encoder"] is None:
            return "open", f"Not known yet: there is no new encoder. Train one: `migrator train {name}`."
        return "open", f"Not verified yet: old and new search have not been compared. `migrator verify {name}` does it."
    outcome, lapsed = verification["outcome"], verification["invalid_reason"]
    moved = is_moved(status)
    if outcome == "pass" and lapsed and not moved:
        how = "passed" if loss is None else "was accepted with a loss"
        return (
            "open",
            f"It {how}, but that no longer counts: the migration {lapsed}. Verify again: `migrator verify {name}`.",
        )
    if outcome == "pass" and loss is not None:
        return "accepted", sentence(sanitized(loss))
    if outcome == "pass":
        doing = "answers queries, as the verification allows" if moved else "may answer queries"
        return "yes", f"Yes: the new encoder {doing}."
    if outcome == "fail":
        return "no", "No: the new encoder must not answer queries. Search would get worse than the gate allows."
    return "open", "Not yet: what was measured cannot tell whether search gets worse, and so nothing is opened."


def _evidence(verification: Mapping[str, Any]) -> list[str]:
    results = verification["results"]
    sentences = [*_gain(results), *_losers(results)]
    sentences += [sentence(sanitized(loss)) for loss in losses(results) if loss != main_loss(results)]
    if verification["outcome"] != "pass":
        sentences += [sentence(sanitized(str(reason))) for reason in (results.get("reasons") or [])[:3]]
    if isinstance(evidence := results.get("evidence"), str):
        sentences.append(f"How it was judged: {sentence(sanitized(evidence), capital=False)}")
    return sentences


def _gain(results: Mapping[str, Any]) -> list[str]:
    metric, served = results.get("metric") or "map@100", results.get("served") or "cross"
    tests = results.get("tests") or {}
    today, new = (tests.get(test) or {} for test in ("baseline", served))
    interval = results.get("interval") or {}
    when = {"cross": " at the canary", "self": " after the backfill"}.get(served, "")
    sentences = []
    if is_number(today.get(metric)) and is_number(new.get(metric)):
        gain = new[metric] - today[metric]
        verb = (
            f"{number(abs(gain))} {'better' if gain > 0 else 'worse'}" if number(abs(gain)) != "0.000" else "the same"
        )
        sentences.append(
            f"Over {results.get('queries', 'the')} test queries, search scores {number(new[metric])} with the new "
            f"encoder{when} and {number(today[metric])} today: {verb} ({metric_name(metric)}; {meaning(metric)})."
        )
    if is_number(interval.get("low")) and is_number(interval.get("high")):
        confidence = results.get("confidence")
        sentences.append(
            f"Confidence: the true difference{when} lies between {signed(interval['low'])} and "
            f"{signed(interval['high'])}"
            + (f", with {percent(confidence)} confidence." if is_number(confidence) else ".")
        )
    return sentences


def _losers(results: Mapping[str, Any]) -> list[str]:
    sentences = []
    flips = results.get("flips") or {}
    if is_number(flips.get("negative")) and is_number(flips.get("positive")):
        sentences.append(
            f"What loses: for {percent(flips['negative'])} of the queries the first result was relevant and "
            f"no longer is; for {percent(flips['positive'])} it was irrelevant and is relevant now."
        )
    for what, name in (("classes", "class"), ("segments", "segment")):
        groups = [
            group
            for group in (results.get(what) or {}).get("worst") or []
            if is_number(group.get("gain")) and group["gain"] < 0
        ]
        if groups:
            worst = min(groups, key=lambda group: float(group["gain"]))
            sentences.append(
                f"The {name} that loses most is “{sanitized(str(worst.get('name')), 60)}”: {signed(worst['gain'])} "
                f"over {worst.get('queries', '?')} queries."
            )
        elif (results.get(what) or {}).get("worst"):
            sentences.append(f"No {name} loses on average.")
    return sentences
