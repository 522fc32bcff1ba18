"""`--wait`: a command that meets a store or a chunk that another process holds waits for it, and says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from migrator.cli import common
from migrator.ledger import this_process
from migrator.project import Project
from migrator.rollout import rollback
from tests.integration.test_walk import to_stage
from tests.world import World

Migrator = Callable[..., int]


@pytest.fixture
def held(world: World, migrator: Migrator, monkeypatch: pytest.MonkeyPatch) -> ExitStack:
    """A finished backfill whose store another writer holds, until the command waits for the second time."""
    to_stage(migrator, "backfill")
    assert migrator("backfill") == 0
    stack = ExitStack()
    project = stack.enter_context(Project.open(world.config))
    stack.enter_context(project.store(write=True))
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            stack.close()

    monkeypatch.setattr(common, "sleep", sleep)
    return stack


@pytest.mark.parametrize("command", [("rollout", "--stage", "cutover"), ("rollback",)], ids=["rollout", "rollback"])
def test_a_held_store(
    held: ExitStack, migrator: Migrator, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    with held:
        capsys.readouterr()
        assert migrator(*command) == (4 if command[0] == "rollout" else 3)
        assert "is being written by" in (told := capsys.readouterr().err)
        assert told.rstrip().endswith("; --wait SECONDS waits for that")
        assert migrator(*command, "--wait", "60") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "waiting up to" in line]
    assert len(lines) == 1
    assert lines[0].endswith(": waiting up to 60 s")


def test_the_time_is_over(
    held: ExitStack, migrator: Migrator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(common, "monotonic", lambda: float(next(clock)))
    with held:
        assert migrator("rollout", "--stage", "cutover", "--wait", "5") == 4
    assert "is being written by" in capsys.readouterr().err


def test_a_rollback_waits_for_a_chunk_in_work(
    world: World, migrator: Migrator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_stage(migrator, "backfill")
    assert migrator("backfill", "--max-items", "10") == 0
    with Project.open(world.config) as project:
        migration, owner = project.migration(), this_process()
        assert project.ledger.lease_chunk(migration.id, owner, seconds=300, leave=set()) is not None
        monkeypatch.setattr(rollback, "sleep", lambda _seconds: project.ledger.return_leases(migration.id, owner))
        assert migrator("rollback") == 0
    assert f"waiting for a backfill run ({owner}) to leave its chunk" in caplog.text
