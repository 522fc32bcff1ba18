"""What is advised after a verdict that is no pass: every command can be typed and every setting written."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import pytest
import yaml

from migrator.cli import cli
from migrator.config import Method, load_config
from migrator.lifecycle.next_steps import NEXT_METHOD, Situation, _untried, next_steps

PLAIN = Situation(
    name="toys", active=False, in_place=True, method="bct", labels_needed=False, independent=True,
    shadow_refused=False, remove_for_shadow=(), queries_file=None, labelled=True, items=5000,
)  # fmt: skip


def results(outcome: str, **tests: Any) -> dict[str, Any]:
    """Of a verification whose findings come out as `tests` says; an inconclusive one names the queries it needs."""
    findings = []
    for test, of in tests.items():
        came, needed = of if isinstance(of, tuple) else (of, None)
        findings.append(
            {"test": test, "outcome": came, "queries": 300, "queries_needed": needed, "interval": {"mean": 0.0}}
        )
    return {"outcome": outcome, "findings": findings}


FAILED = results("fail", cross="pass", lowest="fail", self="pass")
ENDS_WORSE = results("fail", cross="pass", lowest="fail", self="fail")
OPEN = results("inconclusive", cross=("inconclusive", 1240), lowest=("inconclusive", 900), self="pass")


def kinds(ways: list[str]) -> list[str]:
    return [way.partition(":")[0].partition(",")[0] for way in ways]


def test_a_pass_needs_no_way_on():
    assert next_steps(results("pass", cross="pass"), PLAIN) == []
    assert next_steps({}, PLAIN) == []


def test_the_ways_of_each_outcome():
    shadow = "Fill a second collection"
    assert kinds(next_steps(FAILED, PLAIN)) == ["Train with another method", shadow, "Stay with the old encoder"]
    assert kinds(next_steps(OPEN, PLAIN)) == [
        "Judge it on more queries", "Train with another method", shadow, "Stay with the old encoder",
    ]  # fmt: skip


def test_more_queries_say_how_many_and_where_they_come_from():
    assert next_steps(OPEN, PLAIN)[0] == (
        "Judge it on more queries: about 1,240 judged queries would probably decide, 300 were used. Set "
        "`verify.sample: 1240`, then `migrator verify toys --resample-queries`."
    )
    few = next_steps(OPEN, replace(PLAIN, items=800))[0]
    assert "list further images with their classes in `verify.queries`, as there are only 800 items" in few
    assert "list the further ones in q.csv" in next_steps(OPEN, replace(PLAIN, queries_file="q.csv", items=None))[0]
    assert "with `verify.label`, or list images" in next_steps(OPEN, replace(PLAIN, labelled=False))[0]


def test_queries_of_one_class_need_others():
    one = results("inconclusive", cross="inconclusive")
    one["findings"][0]["interval"] = None
    assert next_steps(one, PLAIN)[0] == (
        "Judge it on queries of more classes: list images of other classes in `verify.queries`, then "
        "`migrator verify toys --resample-queries`."
    )


def test_a_difference_too_close_to_the_limit_is_not_for_queries_to_decide():
    close = results("inconclusive", cross="inconclusive")
    assert kinds(next_steps(close, PLAIN))[0] == "Train with another method"


def test_a_shadow_helps_where_the_way_is_worse_or_another_training_is_possible():
    assert "no query meets old and new vectors together" in next_steps(FAILED, PLAIN)[1]
    assert "--method independent" in next_steps(ENDS_WORSE, PLAIN)[1]
    without = [
        next_steps(ENDS_WORSE, replace(PLAIN, independent=False)),
        next_steps(FAILED, replace(PLAIN, shadow_refused=True)),
        next_steps(FAILED, replace(PLAIN, in_place=False)),
    ]
    assert [kinds(ways) for ways in without] == [["Train with another method", "Stay with the old encoder"]] * 3


def test_queries_that_moved_are_taken_back_before_the_encoder_is_exchanged():
    ways = next_steps(FAILED, replace(PLAIN, active=True))
    assert all("`migrator rollback toys`" in way for way in ways)


@pytest.mark.parametrize("found", [FAILED, ENDS_WORSE, OPEN], ids=["fail", "ends worse", "open"])
def test_every_command_is_one_and_every_setting_is_taken(tmp_path: Path, found: dict[str, Any]):
    situations = [
        replace(
            PLAIN, active=active, method=method, labels_needed=labels, labelled=labelled, items=items,
            queries_file=file, remove_for_shadow=("backfill.order",) if labels else (),
        )
        for active, method, labels, labelled, (items, file) in product(
            (False, True), (None, *get_args(Method)), (False, True), (False, True), ((50, None), (None, "q.csv"))
        )
    ]  # fmt: skip
    said = {way for situation in situations for way in next_steps(found, situation)}
    commands = {command for way in said for command in re.findall(r"`migrator ([^`]+)`", way)}
    assert commands
    for command in commands:
        verb, *words = shlex.split(command)
        known = cli.get_command(click.Context(cli), verb)
        assert known is not None, command
        known.make_context(verb, words)
    # To verify the same encoder on the same queries again would give the same answer.
    for way in said:
        if "`migrator verify toys`" in way:
            assert "`migrator plan toys`" in way, way
    for path, value in {pair for way in said for pair in re.findall(r"`([a-z_.]+): (\w+)`", way)}:
        config(tmp_path, path, value)


def config(folder: Path, path: str, value: str) -> None:
    """Reads a configuration with that setting."""
    settings: dict[str, Any] = {
        "store": {"kind": "faiss", "path": "./gallery"},
        "images": {"root": "./images"},
        "old_encoder": {"arch": "resnet18", "weights": "./old.safetensors", "dim": 128, "image_size": 224},
        "new_encoder": {"arch": "resnet50", "dim": 128, "image_size": 224},
        "train": {"items": "train.csv"},
        "verify": {},
    }
    section, key = path.split(".")
    settings.setdefault(section, {})[key] = yaml.safe_load(value)
    (folder / "migrations.yaml").write_text(yaml.safe_dump({"version": 1, "migrations": {"toys": settings}}))
    load_config(folder / "migrations.yaml")


@pytest.mark.parametrize(
    ("method", "weights", "tried", "following"),
    [
        ("advbct", None, [], "bct"),
        ("advbct", None, ["bct"], "lce"),
        ("advbct", None, ["advbct", "bct", "lce", "hot_refresh"], "bct"),
        ("independent", None, [], "advbct"),
        ("procrustes", None, ["ridge"], "residual_mlp"),
        ("procrustes", "new.safetensors", [], "ridge"),
        ("advbct", "new.safetensors", ["ridge"], "procrustes"),
    ],
)
def test_a_method_that_no_run_has_had_yet_is_named(tmp_path, method, weights, tried, following):
    for run in tried:
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"fingerprint": {"train.method": run}}))
    settings = SimpleNamespace(new_encoder=SimpleNamespace(weights=weights))
    project: Any = SimpleNamespace(settings=settings, training_folder=lambda: tmp_path)
    assert _untried(project, method) == following


def test_the_method_after_each_trains_the_same_kind():
    maps = {"procrustes", "ridge", "residual_mlp"}
    assert set(NEXT_METHOD) == set(get_args(Method))
    assert all((after in maps) == (method in maps) and after != method for method, after in NEXT_METHOD.items())
