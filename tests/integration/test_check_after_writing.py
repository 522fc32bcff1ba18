"""No stage opens on vectors that no check has seen: a killed run leaves its check to whoever comes next."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from migrator.adapters.base import StoreUnavailable
from migrator.cli import run
from migrator.project import Project
from migrator.verify import health_check
from tests.integration.test_walk import to_stage
from tests.support.forked import forked
from tests.world import DIM, World

Migrator = Callable[..., int]


def backfill_killed_before_its_check(config: str) -> None:
    """In a process of its own."""
    health_check.check_after_run = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    run(["backfill", "--yes", "--config", config])


def checks(world: World) -> list[dict[str, Any]]:
    with Project.open(world.config) as project:
        events = project.ledger.events(project.migration().id)
    return [event.detail for event in events if event.event == "measured"]


def kill_before_the_check(world: World) -> None:
    process = forked().Process(target=backfill_killed_before_its_check, args=(str(world.config),))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    with Project.open(world.config) as project:
        assert set(project.ledger.counts(project.migration().id).by_state) == {"done"}
    assert checks(world) == []


def spoil(world: World) -> None:
    """Other vectors, under the new encoder's stamp: what a broken writer leaves."""
    with Project.open(world.config) as project, project.store(write=True) as store:
        ids = store.scan_ids(after=None, limit=1000)
        vectors = np.random.default_rng(0).normal(size=(len(ids), DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        store.write_vectors(ids, vectors, project.encoder_ids()[1])
        store.publish()


def test_the_cutover_makes_the_check_of_a_killed_run_and_is_refused_where_it_fails(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    to_stage(migrator, "backfill")
    kill_before_the_check(world)
    spoil(world)
    capsys.readouterr()
    assert migrator("rollout", "--stage", "cutover") == 3
    assert "items read back" in capsys.readouterr().err
    assert len(checks(world)) == 1
    with Project.open(world.config) as project:
        migration = project.migration()
        assert migration.stage == "backfill"
        assert migration.paused is not None
        route = project.ledger.route(migration.collection)
        assert route is not None
        assert route.phase == "backfill"
    assert migrator("rollout", "--stage", "cutover") == 3  # paused, until somebody decides
    assert migrator("resume") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert len(checks(world)) == 1  # it was made, and the operator has seen it


def test_the_next_run_makes_the_check_though_nothing_is_left_to_write(world: World, migrator: Migrator) -> None:
    to_stage(migrator, "backfill")
    kill_before_the_check(world)
    assert migrator("backfill") == 0
    (made,) = checks(world)
    assert made["read_back"]["checked"] > 0
    assert made["read_back"]["mismatched"] == 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert checks(world) == [made]  # once is enough


def test_a_check_that_could_not_be_made_is_made_by_the_cutover(
    world: World, migrator: Migrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object, **__: object) -> None:
        raise StoreUnavailable("gone for the moment")

    to_stage(migrator, "backfill")
    with monkeypatch.context() as during_the_run:
        during_the_run.setattr(health_check, "check_health", down)
        assert migrator("backfill") == 0
    assert checks(world) == []
    assert migrator("rollout", "--stage", "cutover") == 0
    assert len(checks(world)) == 1


def test_without_checks_in_the_configuration_none_is_asked_for(world: World, migrator: Migrator) -> None:
    world.configure(backfill__read_back=0, backfill__measure=False)
    to_stage(migrator, "cutover")
    assert checks(world) == []


def test_a_shadow_gets_no_query_before_its_check(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    world.configure(rollout={"strategy": "shadow", "canary": [100]})
    assert migrator("plan") == 0
    assert migrator("verify") == 0
    for stage in ("prepare", "backfill"):
        assert migrator("rollout", "--stage", stage) == 0
    kill_before_the_check(world)
    assert migrator("rollout", "--stage", "canary") == 0
    assert len(checks(world)) == 1
    assert migrator("rollout", "--stage", "cutover") == 0
    assert len(checks(world)) == 1
