"""The one table of strategies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from migrator.lifecycle.strategy import STRATEGIES, Stage, Strategy

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))


@every_strategy
def test_every_stage_comes_once_and_has_a_purpose(strategy: Strategy) -> None:
    assert sorted(strategy.stages) == sorted(get_args(Stage))
    opened = [command.removeprefix("rollout --stage ") for command in strategy.purposes if "--stage" in command]
    assert opened == list(strategy.stages[1:])
    assert set(strategy.backfill_stages) <= set(strategy.stages)
    assert STRATEGIES[strategy.name] is strategy


@every_strategy
def test_no_old_query_meets_a_new_vector(strategy: Strategy) -> None:
    assert strategy.second_collection or strategy.queries_first
    assert strategy.served_test == ("cross" if strategy.queries_first else "self")
    if strategy.queries_first:
        assert set(strategy.backfill_stages) <= set(strategy.moved_stages)


@pytest.mark.parametrize(
    ("strategy", "stages"),
    [
        ("in_place", ["prepare", "canary", "canary", "backfill", "cutover", "finalize"]),
        ("shadow", ["prepare", "backfill", "canary", "canary", "cutover", "finalize"]),
    ],
)
def test_the_next_stage(strategy: str, stages: list[Stage]) -> None:
    stage: Stage = "planned"
    passed: list[Stage] = []
    share = 0.0
    while stage != "finalize":
        stage = STRATEGIES[strategy].next_stage(stage, canary_percent=share)
        share += 50.0 if stage == "canary" else 0.0
        passed.append(stage)
    assert passed == stages


def test_no_other_module_asks_which_strategy_it_is() -> None:
    package = Path(__file__).parents[2] / "migrator"
    asks = re.compile(r"strategy\s*(==|!=|in \()|[\"'](in_place|shadow)[\"']\s*(==|!=)")
    files = [*package.rglob("*.py"), *package.rglob("*.j2")]
    assert [file.name for file in files if asks.search(file.read_text())] == []
