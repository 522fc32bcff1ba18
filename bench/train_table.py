"""The table of the training benchmark: from per-query metrics to means, intervals, scores and what became of the aims.

Each mean has Student's 95 % interval over the seeds. A difference between two encoders (AdvBCT's cross-test over the
old self-test, its self-test over the independent one's) has a paired bootstrap over queries nested in seeds. P_1 is no
mean over queries: differences in it are paired by seed, with Student's interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.intervals import Interval, over_queries, over_seeds
from bench.machine import machine
from bench.results_files import heading, save
from migrator.evaluation.metrics import p_1, p_comp, p_up

if TYPE_CHECKING:
    from bench.runs import Run
    from bench.train import Case, Plan

METRIC = "map@100"
WITHIN = 0.005
"""How far AdvBCT's self-test may lie below the independent encoder's."""


def scores(new_new: float, new_old: float, old_old: float, best: float) -> dict[str, float]:
    """P_up, P_comp and P_1 of one data set, protocol and seed; NaN where the independent encoder gains nothing."""
    if best <= old_old:
        return {"p_up": p_up([new_new], [best]), "p_comp": math.nan, "p_1": math.nan}
    return {
        "p_up": p_up([new_new], [best]),
        "p_comp": p_comp([new_old], [old_old], [best]),
        "p_1": p_1([new_new], [new_old], [old_old], [best]),
    }


def rows(chosen: list[Case]) -> list[dict[str, Any]]:
    """A row for each data set, protocol and method, over the seeds that are done."""
    grouped: dict[tuple[str, str, str], list[tuple[Case, Run]]] = defaultdict(list)
    for one in chosen:
        for name, run in one.methods.items():
            if one.old.done and one.independent.done and run.done:
                grouped[one.dataset, one.protocol, name].append((one, run))
    return [row(*key, done) for key, done in sorted(grouped.items(), key=lambda pair: pair[0][:2])]


def row(dataset: str, protocol: str, method: str, done: list[tuple[Case, Run]]) -> dict[str, Any]:
    found: dict[str, Any] = {"dataset": dataset, "protocol": protocol, "method": method}
    failed = [run.result()["failed"] for _, run in done if "failed" in run.result()]
    if failed:
        return {**found, "failed": failed}
    old = [one.old.per_query() for one, _ in done]
    best = [one.independent.per_query() for one, _ in done]
    new = [run.per_query() for _, run in done]
    found["seeds"] = [one.seed for one, _ in done]
    values: dict[str, list[float]] = defaultdict(list)
    for o, b, n in zip(old, best, new, strict=True):
        for metric in ("map@100", "recall@1"):
            for side in ("self", "cross", "reverse"):
                values[f"{side}/{metric}"].append(float(n[f"{side}/{metric}"].mean()))
            values[f"old/{metric}"].append(float(o[f"self/{metric}"].mean()))
            values[f"independent/{metric}"].append(float(b[f"self/{metric}"].mean()))
        named = (values[f"{side}/{METRIC}"][-1] for side in ("self", "cross", "old", "independent"))
        for name, value in scores(*named).items():
            values[name].append(value)
        values["negative_flips"].append(float(n["flips"].mean()))
    found["values"] = dict(values)
    found["means"] = {name: over_seeds(each)._asdict() for name, each in values.items()}
    cross = [n[f"cross/{METRIC}"] - o[f"self/{METRIC}"] for n, o in zip(new, old, strict=True)]
    same = [n[f"self/{METRIC}"] - b[f"self/{METRIC}"] for n, b in zip(new, best, strict=True)]
    found["cross_minus_old"] = over_queries(cross)._asdict()
    found["self_minus_independent"] = over_queries(same)._asdict()
    return found


def aims(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether AdvBCT is what it should be, for each data set and protocol, and once on average."""
    found = []
    by_place: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for one in table:
        if "failed" not in one:
            by_place[one["dataset"], one["protocol"]][one["method"]] = one
    gaps = []
    for (dataset, protocol), methods in by_place.items():
        advbct = methods.get("advbct")
        if advbct is None:
            continue
        cross, same = advbct["cross_minus_old"], advbct["self_minus_independent"]
        rivals = {}
        for name, other in methods.items():
            if name != "advbct":
                rivals[name] = against(advbct, other)._asdict()
                if name == "bct":
                    gaps.append(p1_gaps(advbct, other))
        # Below by more than the interval; of one seed, which has no interval, below at all.
        beaten_by = [name for name, gap in rivals.items() if gap["mean"] < 0 and not gap["high"] >= 0]
        found.append(
            {
                "dataset": dataset,
                "protocol": protocol,
                "cross_beats_old": cross["low"] > 0,
                "self_within_half_a_point": same["mean"] >= -WITHIN,
                "p_1_not_below": not beaten_by,
                "beaten_by": beaten_by,
                "p_1_minus": rivals,
            }
        )
    if gaps:
        # Averaged over the places first: a seed's value is one mean over all of them.
        length = min(map(len, gaps))
        average = over_seeds(np.mean([gap[:length] for gap in gaps], axis=0))
        found.append({"p_1_minus_bct_on_average": average._asdict(), "above_bct": average.mean > 0})
    return found


def p1_gaps(advbct: dict[str, Any], other: dict[str, Any]) -> np.ndarray:
    """Differences in P_1 of the seeds that both have."""
    shared = [seed for seed in advbct["seeds"] if seed in other["seeds"]]
    return np.array(
        [
            advbct["values"]["p_1"][advbct["seeds"].index(seed)] - other["values"]["p_1"][other["seeds"].index(seed)]
            for seed in shared
        ]
    )


def against(advbct: dict[str, Any], other: dict[str, Any]) -> Interval:
    return over_seeds(p1_gaps(advbct, other))


# --- as Markdown ----------------------------------------------------------------------------------------------------


def points(interval: dict[str, float], *, sign: bool = False) -> str:
    """In points (hundredths), with the interval in brackets."""
    shown = "{:+.1f}" if sign else "{:.1f}"
    mean = shown.format(100 * interval["mean"])
    if math.isnan(interval["low"]):
        return mean
    return f"{mean} [{shown.format(100 * interval['low'])}, {shown.format(100 * interval['high'])}]"


def share(interval: dict[str, float]) -> str:
    if math.isnan(interval["mean"]):
        return "-"
    if math.isnan(interval["low"]):
        return f"{interval['mean']:.3f}"
    return f"{interval['mean']:.3f} ± {interval['high'] - interval['mean']:.3f}"


def place_table(dataset: str, protocol: str, table: list[dict[str, Any]]) -> list[str]:
    good = [one for one in table if "failed" not in one]
    lines = [f"## {dataset}, {protocol.replace('_', '-')}", ""]
    if good:
        means = good[0]["means"]
        lines += [
            f"Old self-test: mAP@100 {points(means['old/map@100'])}, recall@1 {points(means['old/recall@1'])}. "
            f"Independent encoder: {points(means['independent/map@100'])}, {points(means['independent/recall@1'])}.",
            "",
        ]
    lines += [
        "| method | self | cross | reverse | cross - old | self - independent | recall@1: self | cross | flips "
        "| P_up | P_comp | P_1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in table:
        if "failed" in one:
            lines.append(f"| {one['method']} | failed: {one['failed'][0]} |" + " |" * 10)
            continue
        means = one["means"]
        cells = [
            one["method"],
            *(points(means[f"{side}/map@100"]) for side in ("self", "cross", "reverse")),
            points(one["cross_minus_old"], sign=True),
            points(one["self_minus_independent"], sign=True),
            f"{100 * means['self/recall@1']['mean']:.1f}",
            f"{100 * means['cross/recall@1']['mean']:.1f}",
            f"{100 * means['negative_flips']['mean']:.1f} %",
            *(share(means[name]) for name in ("p_up", "p_comp", "p_1")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def aims_table(found: list[dict[str, Any]]) -> list[str]:
    def word(met: bool) -> str:
        return "met" if met else "**missed**"

    lines = [
        "## Aims",
        "",
        "| data | protocol | cross-test above old, lower bound above 0 "
        "| self-test at most 0.5 points below independent | P_1 not below any other's |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        if "dataset" in one:
            beaten = f" (below {', '.join(one['beaten_by'])})" if one["beaten_by"] else ""
            lines.append(
                f"| {one['dataset']} | {one['protocol'].replace('_', '-')} | {word(one['cross_beats_old'])} | "
                f"{word(one['self_within_half_a_point'])} | {word(one['p_1_not_below'])}{beaten} |"
            )
        else:
            gap = one["p_1_minus_bct_on_average"]
            lines += [
                "",
                f"P_1 minus BCT's, averaged over data and protocols: {points(gap, sign=True)} hundredths, "
                f"{word(one['above_bct'])}.",
            ]
    return [*lines, ""]


def write_table(plan: Plan, chosen: list[Case]) -> None:
    table = rows(chosen)
    found: dict[str, Any] = {"machine": machine(), "plan": asdict(plan), "rows": table, "aims": aims(table)}
    seeds = sorted({seed for one in table for seed in one.get("seeds", [])})
    lines = heading(
        "Compatible training",
        found,
        f"mAP@100 and recall@1 in points, means over {len(seeds)} seeds with Student's 95 % interval in brackets; "
        "a seed decides split, subsample and weights. Differences: paired bootstrap over queries nested in seeds. "
        "Flips: queries whose first answer was right with the old encoder and is wrong in the cross-test.",
    )
    places = sorted({(one["dataset"], one["protocol"]) for one in table})
    for dataset, protocol in places:
        lines += place_table(
            dataset, protocol, [one for one in table if (one["dataset"], one["protocol"]) == (dataset, protocol)]
        )
    lines += aims_table(found["aims"])
    save("training", found, "\n".join(lines).rstrip() + "\n")
