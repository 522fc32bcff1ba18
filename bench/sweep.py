"""AdvBCT's settings one at a time around the defaults, `python -m bench sweep`: how the defaults were chosen.

Smaller than the table, so that every variant has five seeds on both data sets under three protocols. A variant is
compared with the defaults in pairs: same data, same split, same old encoder, same seed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from bench.intervals import over_seeds
from bench.machine import machine
from bench.results_files import heading, save
from bench.runs import do_all
from bench.splits import Size
from bench.train import Case, Plan, arguments, cases, runs_of
from bench.train_table import points, scores

SWEEP = Plan(
    sizes={"fashion": Size(2000, 1000, 3000), "emoji": Size(2400)},
    epochs={"fashion": 6, "emoji": 6},
    same_backbone="test_resnet",
    backbones=("test_byobnet", "test_resnet"),
    image_size=32,
    dim=128,
    seeds=5,
    lr=0.005,
)

TRIED: dict[str, tuple[Any, ...]] = {
    "radius_quantile": (0.25, 0.5, 0.9),
    "radius_limit": (0.25, 0.5, 1.0),
    "boundary_weight": (0.5, 2.0, 5.0),
    "adversarial_weight": (0.0, 1.0, 3.0),
    "anchor_weight": (0.0, 1.0, 2.0),
    "reference": (False, True),
}
"""Values of each setting; the defaults are among them. The committed result has switches too that it made needless."""

DEFAULTS = "defaults"
MEASURES = {
    "cross - old": "cross-test minus old self-test, points of mAP@100",
    "self - independent": "self-test minus the independent encoder's, points of mAP@100",
    "P_1": "P_1, in hundredths",
}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """What `bench.train.cases` takes as methods: the defaults, and each value that is not one of them.

    Settings that the trainer does not have are skipped and named.
    """
    from migrator.trainer.methods.registry import LossSettings

    known = {field.name: field.default for field in fields(LossSettings)}
    found: dict[str, tuple[str, dict[str, Any]]] = {DEFAULTS: ("advbct", {})}
    for name, values in TRIED.items():
        if name not in known:
            print(f"{name} is no setting of the trainer: skipped")
            continue
        found |= {f"{name}={value}": ("advbct", {name: value}) for value in values if value != known[name]}
    return found


def measured(one: Case, variant: str) -> dict[str, float]:
    """The three measures of one run, in hundredths; NaN where training failed."""
    result = one.methods[variant].result()
    if "failed" in result:
        return dict.fromkeys(MEASURES, math.nan)
    new, cross = (result["means"][f"{side}/map@100"] for side in ("self", "cross"))
    old, best = (run.result()["means"]["self/map@100"] for run in (one.old, one.independent))
    p_1 = scores(new, cross, old, best)["p_1"]
    return {"cross - old": 100 * (cross - old), "self - independent": 100 * (new - best), "P_1": 100 * p_1}


def table(done: list[Case]) -> list[dict[str, Any]]:
    """A row for each variant and place, and one for its average over the places."""
    seeds = sorted({one.seed for one in done})
    names = list(dict.fromkeys(name for one in done for name in one.methods))
    places = list(dict.fromkeys((one.dataset, one.protocol) for one in done))
    found = {
        (one.dataset, one.protocol, one.seed, name): measured(one, name)
        for one in done
        for name, run in one.methods.items()
        if run.done and one.old.done and one.independent.done
    }
    rows = []
    for name in names:
        for place in [*places, None]:
            row: dict[str, Any] = {"variant": name, "place": "/".join(place) if place else "average"}
            for measure in MEASURES:
                tried, base = (
                    np.array([mean_over([place] if place else places, seed, which, found, measure) for seed in seeds])
                    for which in (name, DEFAULTS)
                )
                both = np.isfinite(tried) & np.isfinite(base)
                row["seeds"] = int(both.sum())
                if both.any():
                    row[measure] = over_seeds(tried[both])._asdict()
                    row[f"{measure}, gain"] = over_seeds(tried[both] - base[both])._asdict()
            rows.append(row)
    return rows


def mean_over(
    places: list[tuple[str, str]],
    seed: int,
    variant: str,
    found: dict[tuple[str, str, int, str], dict[str, float]],
    measure: str,
) -> float:
    """NaN unless the variant is done in every place."""
    values = [found.get((*place, seed, variant), {}).get(measure, math.nan) for place in places]
    return float(np.mean(values))


def as_markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for place in ("average", *dict.fromkeys(row["place"] for row in rows if row["place"] != "average")):
        lines += [
            f"## {place.replace('_', '-')}",
            "",
            "| variant | cross - old | against the defaults | self - independent | against the defaults "
            "| P_1 | against the defaults | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["place"] == place:
                cells = [row["variant"]]
                for measure in MEASURES:
                    cells += [cell(row.get(measure), sign=measure != "P_1"), gain(row, measure)]
                lines.append(f"| {' | '.join(cells)} | {row['seeds']} |")
        lines.append("")
    return lines


def cell(interval: dict[str, float] | None, *, sign: bool) -> str:
    if interval is None:
        return "failed"
    return f"{interval['mean']:+.2f}" if sign else f"{interval['mean']:.2f}"


def gain(row: dict[str, Any], measure: str) -> str:
    """Bold where the interval leaves out zero."""
    interval = row.get(f"{measure}, gain")
    if interval is None or row["variant"] == DEFAULTS:
        return ""
    shown = points({name: value / 100 for name, value in interval.items()}, sign=True)
    return f"**{shown}**" if interval["low"] > 0 or interval["high"] < 0 else shown


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench sweep", description=__doc__.splitlines()[0])
    arguments(parser)
    args = parser.parse_args(argv)
    tried = variants()
    only = args.only
    if only:  # there is nothing to compare with but the defaults
        only = [*only, *("/".join([*[*wanted.split("/"), "*"][:2], DEFAULTS]) for wanted in only)]
    chosen = cases(SWEEP, tried, only, args.seeds or SWEEP.seeds)
    if not args.table:
        redone = [run for one in chosen for run in one.methods.values()]
        for run in do_all(runs_of(chosen), redone if args.again else [], jobs=args.jobs, device=SWEEP.device):
            print(f"failed: {run.name}: {run.result()['failed']}")
    rows = table(chosen)
    results = {"machine": machine(), "plan": asdict(SWEEP), "tried": TRIED, "rows": rows}
    what = (
        f"{len({one.seed for one in chosen})} seeds, {len({one.dataset for one in chosen})} data sets, "
        f"{len({one.protocol for one in chosen})} protocols; one setting changed at a time. Points of mAP@100 and "
        "hundredths of P_1; differences from the defaults are paired by seed, with Student's 95 % interval in "
        "brackets, bold where it leaves out zero."
    )
    save("sweep", results, "\n".join(heading("Settings of AdvBCT", results, what) + as_markdown(rows)).rstrip() + "\n")
