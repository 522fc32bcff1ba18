"""The training benchmark: every method under every protocol on both data sets, `python -m bench train`.

For each data set, protocol and seed: an old encoder, an independent new one (the upper bound), and each method. All of
them are tested on images, and for the emoji on classes, that no encoder was trained on. Runs are resumed one by one.
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import dataclass
from typing import Any

from bench.runs import POST_HOC, Run, do_all, fit_settings, images_of
from bench.splits import PROTOCOLS, Size

DATASETS = ("fashion", "emoji")
TRAINED = ("advbct", "bct", "lce", "hot_refresh")
METHODS = (*TRAINED, *POST_HOC)


@dataclass(frozen=True)
class Plan:
    """How large a benchmark is. The backbones are (old, new)."""

    sizes: dict[str, Size]
    epochs: dict[str, int]
    same_backbone: str
    backbones: tuple[str, str]
    image_size: int
    dim: int
    seeds: int
    lr: float = 0.005
    """Chosen by the self-test of independent encoders, which no method under test is."""
    batch_size: int = 64
    """Half the trainer's own: of so few images an epoch has few steps."""
    device: str = "cpu"


DEFAULT = Plan(
    sizes={"fashion": Size(6000, 1000, 4000), "emoji": Size()},
    epochs={"fashion": 8, "emoji": 12},
    same_backbone="test_resnet",
    backbones=("test_byobnet", "test_resnet"),
    image_size=32,
    dim=128,
    seeds=3,
)
FULL = Plan(
    sizes={"fashion": Size(), "emoji": Size()},
    epochs={"fashion": 20, "emoji": 60},
    same_backbone="resnet18",
    backbones=("resnet18", "resnet50"),
    image_size=64,
    dim=128,
    seeds=5,
    device="auto",
)


@dataclass(frozen=True)
class Case:
    """A data set, a protocol and a seed, with what is compared there."""

    dataset: str
    protocol: str
    seed: int
    old: Run
    independent: Run
    methods: dict[str, Run]


def case(plan: Plan, dataset: str, protocol: str, seed: int, methods: dict[str, tuple[str, dict[str, Any]]]) -> Case:
    """`methods`: a method and settings that differ from the defaults, by the name that the table shows."""
    old_arch, new_arch = plan.backbones if protocol == "extended_backbone" else (plan.same_backbone,) * 2

    def run(method: str, arch: str, seen: str, builds_on: tuple[Run, ...] = (), **chosen: Any) -> Run:
        basics = {"epochs": plan.epochs[dataset], "lr": plan.lr, "batch_size": plan.batch_size}
        return Run(
            dataset=dataset,
            digest=images_of(dataset).digest,
            size=plan.sizes[dataset],
            seed=seed,
            method=method,
            seen=seen,
            arch=arch,
            image_size=plan.image_size,
            dim=plan.dim,
            settings=() if method in POST_HOC else fit_settings(method, seed, **{**basics, **chosen}),
            builds_on=builds_on,
        )

    old = run("independent", old_arch, "all" if protocol == "extended_backbone" else protocol)
    new = run("independent", new_arch, "all")
    return Case(
        dataset,
        protocol,
        seed,
        old,
        new,
        {
            name: run(method, new_arch, "all", (old, new) if method in POST_HOC else (old,), **chosen)
            for name, (method, chosen) in methods.items()
        },
    )


def cases(plan: Plan, methods: dict[str, tuple[str, dict[str, Any]]], only: list[str], seeds: int) -> list[Case]:
    """Those whose `dataset/protocol/method` begins with one of `only`, where that is given."""
    chosen = []
    for seed in range(seeds):
        for dataset in DATASETS:
            for protocol in PROTOCOLS:
                wanted = {name: how for name, how in methods.items() if selected(f"{dataset}/{protocol}/{name}", only)}
                if wanted:
                    chosen.append(case(plan, dataset, protocol, seed, wanted))
    return chosen


def selected(path: str, only: list[str]) -> bool:
    """Whether `fashion/extended_data/bct` is selected: by itself, by its beginning, or with * in place of a part."""
    parts = path.split("/")
    return not only or any(
        all(want in ("*", part) for want, part in zip(wanted.split("/"), parts, strict=False)) for wanted in only
    )


def runs_of(chosen: list[Case]) -> list[Run]:
    return [run for one in chosen for run in (one.old, one.independent, *one.methods.values())]


def override(text: str) -> tuple[str, Any]:
    """`radius_limit=0.7` -> ("radius_limit", 0.7)."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the table and the sweep both take."""
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, of one thread each")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--only", action="append", default=[], metavar="DATASET/PROTOCOL/METHOD", help="repeatable")
    parser.add_argument(
        "--again", action="store_true", help="do the selected runs again: for after a change of the code"
    )
    parser.add_argument("--table", action="store_true", help="write the table of what is done; train nothing")


def main(argv: list[str]) -> None:
    from bench.train_table import write_table

    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__.splitlines()[0])
    arguments(parser)
    parser.add_argument("--full", action="store_true", help="five seeds, all data, ResNets: hours on a GPU")
    parser.add_argument(
        "--set", action="append", default=[], type=override, metavar="KEY=VALUE", help="a setting of the methods"
    )
    args = parser.parse_args(argv)
    plan = FULL if args.full else DEFAULT
    methods = {name: (name, dict(args.set) if name in TRAINED else {}) for name in METHODS}
    # The paper's three terms alone, beside the trainer's own.
    methods["advbct, no anchor"] = ("advbct", {**dict(args.set), "anchor_weight": 0.0})
    chosen = cases(plan, methods, args.only, args.seeds or plan.seeds)
    if not args.table:
        redone = [run for one in chosen for run in one.methods.values()]
        failed = do_all(runs_of(chosen), redone if args.again else [], jobs=args.jobs, device=plan.device)
        for run in failed:
            print(f"failed: {run.name}: {run.result()['failed']}")
    write_table(plan, chosen)
