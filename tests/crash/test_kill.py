"""A migration killed with SIGKILL again and again ends like one that was never interrupted; so does its rollback."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migrator.evaluation.ordering import worst_first
from migrator.project import Project
from tests.crash.commands import Commands
from tests.world import World, embed_images, make_world

pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as running:
        yield running


def arguments(world: World, verb: str, *words: str) -> list[str]:
    asks = verb in ("rollout", "backfill", "rollback")
    return [verb, "--config", str(world.config), *words, *(["--yes"] if asks else [])]


def succeed(commands: Commands, world: World, verb: str, *words: str) -> float:
    code, seconds = commands.run(*arguments(world, verb, *words))
    assert code == 0, f"{verb} {words} ended with {code}"
    return seconds


def to_backfill(commands: Commands, world: World) -> None:
    succeed(commands, world, "plan")
    succeed(commands, world, "verify")
    succeed(commands, world, "rollout", "--stage", "prepare")
    succeed(commands, world, "rollout", "--stage", "canary")
    succeed(commands, world, "rollout", "--stage", "backfill")


def kill_at_random(
    commands: Commands, world: World, rng: random.Random, longest: float, verb: str, *words: str
) -> float | None:
    """Starts a command and kills it within `longest` seconds; where it was done before, returns its own seconds."""
    began = time.monotonic()
    commands.start(*arguments(world, verb, *words))
    code = commands.wait(rng.uniform(0, longest))
    took = time.monotonic() - began
    if code is None:
        code = commands.kill()
    assert code in (0, -9), f"{verb} ended with {code}"
    return None if code == -9 else took


def each_is_one_of(vectors: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Checks that no vector is torn; returns which are new."""
    is_old, is_new = (vectors == old).all(axis=1), (vectors == new).all(axis=1)
    assert (is_old | is_new).all()
    return is_new


def stamps(world: World) -> tuple[int, int]:
    with Project.open(world.config) as project, project.store() as store:
        return store.count(), store.count(stamp=project.encoder_ids()[1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("items", "kills"), [(320, 16), pytest.param(600, 30, marks=pytest.mark.long)])
def test_killed_again_and_again(commands: Commands, tmp_path: Path, items: int, kills: int) -> None:
    first = make_world(tmp_path / "first", items=items)
    first.configure(backfill__chunk_size=20)
    old = first.vectors()
    original = (first.gallery / "index.faiss").read_bytes()
    calm = World(tmp_path / "calm")
    shutil.copytree(first.folder, calm.folder)
    to_backfill(commands, calm)
    part = succeed(commands, calm, "backfill", "--max-items", "40")
    succeed(commands, calm, "backfill")
    cut = succeed(commands, calm, "rollout", "--stage", "cutover")
    new = calm.vectors()
    assert (new != old).any(axis=1).all()
    back = succeed(commands, calm, "rollback")
    assert (calm.gallery / "index.faiss").read_bytes() == original

    world = first
    rng = random.Random(20)
    to_backfill(commands, world)
    killed = 0
    while killed < kills:
        # Short runs, so that many of the kills fall into the publication at a run's end.
        took = kill_at_random(commands, world, rng, part, "backfill", "--max-items", "40")
        killed += took is None
        # The machine may have been busier when the calm run was measured: the kills are to meet this one.
        part = min(part, took or part)
        each_is_one_of(world.vectors(), old, new)
        if stamps(world)[1] == items:
            break
    assert killed >= kills / 2, "too few kills hit a running backfill for this to mean anything"
    succeed(commands, world, "backfill")
    assert stamps(world) == (items, items)
    np.testing.assert_array_equal(world.vectors(), new)
    with Project.open(world.config) as project:
        migration = project.migration()
        counts = project.ledger.counts(migration.id)
        assert counts.by_state == {"done": items // 20}
        assert (counts.written, counts.open_failures) == (items, 0)

    for _ in range(5):
        kill_at_random(commands, world, rng, cut, "rollout", "--stage", "cutover")
        with Project.open(world.config) as project:
            if project.migration().stage == "cutover":
                break
    else:
        succeed(commands, world, "rollout", "--stage", "cutover")
    np.testing.assert_array_equal(world.vectors(), new)

    for _ in range(10):
        kill_at_random(commands, world, rng, back, "rollback")
        each_is_one_of(world.vectors(), old, new)
        with Project.open(world.config) as project:
            if project.migration().state == "rolled_back":
                break
    else:
        succeed(commands, world, "rollback")
    np.testing.assert_array_equal(world.vectors(), old)
    assert (world.gallery / "index.faiss").read_bytes() == original
    assert stamps(world) == (items, 0)


def killed_once(commands: Commands, world: World, state: str, verb: str) -> None:
    """Starts a command and kills it when some chunks are in that state, and others are not."""
    with Project.open(world.config) as project:
        migration = project.migration()
        commands.start(*arguments(world, verb))
        while project.ledger.counts(migration.id).by_state.get(state, 0) < 3:
            assert commands.wait(0.01) is None, f"{verb} ended before it was killed"
    assert commands.kill() == -9


def test_killed_with_the_worst_items_first(commands: Commands, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", items=120)
    world.configure(backfill__chunk_size=4, backfill__order="worst_first", backfill__nice=1.0)
    old, kinds = world.vectors(), [f"kind {row % 3}" for row in range(120)]
    order = worst_first(old, kinds, seed=0)
    to_backfill(commands, world)

    killed_once(commands, world, "done", "backfill")
    with Project.open(world.config) as project, project.store() as store:
        waiting = store.unstamped(project.encoder_ids()[1], after=None, limit=120)
    assert len(waiting) in range(4, 120, 4)
    assert waiting == sorted(order[-len(waiting) :])
    succeed(commands, world, "backfill")
    assert stamps(world) == (120, 120)
    with Project.open(world.config) as project:
        migration = project.migration()
        counts = project.ledger.counts(migration.id)
        cut = [project.ledger.ids_of(chunk) for chunk in project.ledger.chunks(migration.id)]
    assert cut == [order[start : start + 4].tolist() for start in range(0, 120, 4)]
    assert (counts.by_state, counts.written) == ({"done": 30}, 120)
    new = embed_images(world, "new", [f"{row:05d}.png" for row in range(120)])
    np.testing.assert_allclose(world.vectors(), new, rtol=0, atol=1e-5)

    succeed(commands, world, "rollout", "--stage", "cutover")
    killed_once(commands, world, "restored", "rollback")
    succeed(commands, world, "rollback")
    np.testing.assert_array_equal(world.vectors(), old)
    assert stamps(world) == (120, 0)
