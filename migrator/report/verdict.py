"""The answer in plain words: may the new encoder answer queries, by how much better, how sure, and what loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from migrator.words import is_number, metric_name, number, percent, sentence, shown, signed

_MEANING = {
    "map": "1 means that every right answer comes before every wrong one",
    "recall": "1 means that every question finds a right answer",
    "precision": "1 means that all answers are right",
    "ndcg": "1 means that the best answers come first",
    "mrr": "1 means that the first answer is always right",
}
_NEW_ANSWERS = {"in_place": ("backfill", "cutover", "finalize"), "shadow": ("cutover", "finalize")}


def is_moved(status: Mapping[str, Any]) -> bool:
    """Whether every query is with the new encoder, so that a verification is behind the migration, however old."""
    return status["stage"] in _NEW_ANSWERS.get(status["strategy"] or "", ())


def meaning(metric: str) -> str:
    """What a value of a metric says."""
    return _MEANING.get(metric.partition("@")[0], "1 is perfect")


def verdict(facts: Mapping[str, Any]) -> dict[str, Any]:
    """From the other facts: `answer` (yes, no, open or back), a `headline`, and `sentences` that give the reasons."""
    answer, headline = _headline(facts)
    verification = facts["verification"]
    sentences = [] if verification is None else _evidence(verification)
    return {"answer": answer, "headline": headline, "sentences": [*sentences, *_during_backfill(facts)]}


def _during_backfill(facts: Mapping[str, Any]) -> list[str]:
    sentences = []
    value, read_back = last_with(facts, "value"), last_with(facts, "read_back")
    if value is not None and is_number(value["value"]):
        sentences.append(
            f"When it was last measured, with {percent(value.get('share'))} of the collection embedded anew, search "
            f"scored {number(value['value'])}."
        )
    if read_back is not None and read_back["read_back"].get("wrong"):
        sentences.append(
            f"Of {read_back['read_back'].get('checked', '?')} items that were read back after the last run, "
            f"{read_back['read_back']['wrong']} did not hold the vector that the new encoder gives for their image."
        )
    return sentences


def last_with(facts: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The newest measurement of the collection that has a `key`."""
    return next((entry for entry in reversed(facts["measured"]) if entry.get(key) is not None), None)


def _headline(facts: Mapping[str, Any]) -> tuple[str, str]:
    status, verification, last = facts["status"], facts["verification"], last_with(facts, "outcome")
    name, state = status["migration"], status["state"]
    if state == "rolled_back":
        return "back", "Taken back: the old encoder answers every query again."
    if state == "rolling_back":
        return "back", "Being taken back: the old vectors are being restored."
    if state == "finished":
        return "yes", "Done: the new encoder answers every query."
    if last is not None and last["outcome"] == "below the gate":
        return "no", "Stop: when it was last measured, search was below the gate."
    if verification is None:
        if status["new_encoder"] is None:
            return "open", f"Not known yet: there is no new encoder. Train one: `migrator train {name}`."
        return "open", f"Not verified yet: old and new search have not been compared. `migrator verify {name}` does it."
    outcome, lapsed = verification["outcome"], verification["why_not"]
    moved = is_moved(status)
    if outcome == "pass" and lapsed and not moved:
        return "open", f"It passed, but that no longer counts: the migration {lapsed}. Again: `migrator verify {name}`."
    if outcome == "pass":
        doing = "answers queries, as the verification allows" if moved else "may answer queries"
        return "yes", f"Yes: the new encoder {doing}."
    if outcome == "fail":
        return "no", "No: the new encoder must not answer queries. Search would get worse than the gate allows."
    return "open", "Not yet: what was measured cannot tell whether search gets worse, and so nothing is opened."


def _evidence(verification: Mapping[str, Any]) -> list[str]:
    results = verification["results"]
    sentences = [*_gain(results), *_losers(results)]
    if verification["outcome"] != "pass":
        sentences += [sentence(shown(str(reason))) for reason in (results.get("reasons") or [])[:3]]
    if isinstance(evidence := results.get("evidence"), str):
        sentences.append(f"How it was judged: {sentence(shown(evidence), capital=False)}")
    return sentences


def _gain(results: Mapping[str, Any]) -> list[str]:
    metric, served = results.get("metric") or "map@100", results.get("served") or "cross"
    tests = results.get("tests") or {}
    today, new = (tests.get(test) or {} for test in ("old", served))
    interval = results.get("interval") or {}
    sentences = []
    if is_number(today.get(metric)) and is_number(new.get(metric)):
        gain = new[metric] - today[metric]
        verb = (
            f"{number(abs(gain))} {'better' if gain > 0 else 'worse'}" if number(abs(gain)) != "0.000" else "the same"
        )
        sentences.append(
            f"Over {results.get('queries', 'the')} test queries, search scores {number(new[metric])} with the new "
            f"encoder and {number(today[metric])} today: {verb} ({metric_name(metric)}; {meaning(metric)})."
        )
    if is_number(interval.get("low")) and is_number(interval.get("high")):
        sure = results.get("confidence")
        sentences.append(
            f"How sure: the true difference lies between {signed(interval['low'])} and {signed(interval['high'])}"
            + (f", with {percent(sure)} confidence." if is_number(sure) else ".")
        )
    return sentences


def _losers(results: Mapping[str, Any]) -> list[str]:
    sentences = []
    flips = results.get("flips") or {}
    if is_number(flips.get("negative")) and is_number(flips.get("positive")):
        sentences.append(
            f"What loses: for {percent(flips['negative'])} of the queries the first answer was right and is wrong "
            f"now; for {percent(flips['positive'])} it was wrong and is right now."
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
                f"The {name} that loses most is “{shown(str(worst.get('name')), 60)}”: {signed(worst['gain'])} over "
                f"{worst.get('queries', '?')} queries."
            )
        elif (results.get(what) or {}).get("worst"):
            sentences.append(f"No {name} loses on average.")
    return sentences
