"""Both strategies on every store, killed again and again, and beside an application that never stops writing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from migrator.project import Project
from tests.crash.commands import Commands
from tests.kinds import KINDS, Item, Kind, QdrantFolder, QdrantOverRest
from tests.world import World, embed_images, make_world

pytestmark = pytest.mark.crash

ITEMS = 240


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as running:
        yield running


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("crash") / "world", items=ITEMS)
    world.configure(backfill__chunk_size=20)
    return world


class Killer:
    """Runs commands on a world, and kills them at random moments."""

    def __init__(self, commands: Commands, world: World, seed: int) -> None:
        self.commands, self.world, self.rng = commands, world, random.Random(seed)
        self.killed = 0

    def words(self, verb: str, *words: str) -> list[str]:
        asks = verb in ("rollout", "backfill", "rollback")
        return [verb, "--config", str(self.world.config), *words, *(["--yes"] if asks else [])]

    def succeed(self, verb: str, *words: str) -> float:
        code, seconds = self.commands.run(*self.words(verb, *words))
        assert code == 0, f"{verb} {words} ended with {code}"
        return seconds

    def kill(self, longest: float, verb: str, *words: str) -> bool:
        """Starts a command and kills it within `longest` seconds; returns whether it was faster."""
        self.commands.start(*self.words(verb, *words))
        code = self.commands.wait(self.rng.uniform(0, longest))
        if code is None:
            code = self.commands.kill()
        assert code in (0, -9), f"{verb} {words} ended with {code}"
        self.killed += code == -9
        return code == 0

    def until_done(self, longest: float, kills: int, verb: str, *words: str) -> None:
        """Kills a command up to `kills` times; then lets it come to its end."""
        for _ in range(kills):
            if self.kill(longest, verb, *words):
                return
        self.succeed(verb, *words)

    def migration(self) -> Any:
        with Project.open(self.world.config) as project:
            return project.migration()

    def to_backfill(self, strategy: str) -> float:
        """Opens the backfill; returns the seconds that a step of the rollout takes."""
        for verb in ("plan", "verify"):
            self.succeed(verb)
        self.succeed("rollout", "--stage", "prepare")
        if strategy == "in_place":
            self.canary()
        return self.succeed("rollout", "--stage", "backfill")

    def canary(self) -> None:
        self.succeed("rollout", "--stage", "canary")


def vectors_by(world: World, which: str) -> dict[str, np.ndarray]:
    names = sorted(path.name for path in world.images.iterdir())
    return dict(zip(names, embed_images(world, which, names), strict=True))


def assert_all(items: dict[Any, Item], vectors: dict[str, np.ndarray], payloads: dict[Any, Any]) -> None:
    assert {item: dict(found.payload) for item, found in items.items()} == payloads
    assert all(found.near(vectors[found.payload["path"]]) for found in items.values())


Make = Callable[[World], Kind]


def killed_there_and_back(
    commands: Commands, first: World, folder: Path, make: Make, strategy: str, kills: int
) -> None:
    world = World(folder / "world")
    shutil.copytree(first.folder, world.folder)
    # What is killed is the engine. The health check after a run only reads; test_kill has it.
    world.configure(rollout__strategy=strategy, backfill__read_back=0, backfill__measure=False)
    kind = make(world)
    with kind.running(folder / "server"):
        kind.use()
        _killed_there_and_back(commands, kind, strategy, kills)


def _killed_there_and_back(commands: Commands, kind: Kind, strategy: str, kills: int) -> None:
    world = kind.world
    before = kind.items()
    payloads = {item: dict(found.payload) for item, found in before.items()}
    old, new = vectors_by(world, "old"), vectors_by(world, "new")
    killer = Killer(commands, world, 3)
    step = killer.to_backfill(strategy)
    part = killer.succeed("backfill", "--max-items", "40")
    shadow = killer.migration().shadow
    while killer.killed < kills:  # and some more below
        killer.kill(part, "backfill", "--max-items", "40")
    items = kind.items()
    assert items.keys() == before.keys()
    for found in items.values():  # in place every vector is one of the two, and never a torn one
        path = found.payload["path"]
        assert found.near(old[path]) or (strategy == "in_place" and found.near(new[path]))
    killer.until_done(2 * part, 3, "backfill")
    if strategy == "shadow":
        killer.canary()
        killer.until_done(part, 2, "backfill")
    for _ in range(3):
        killer.kill(step, "rollout", "--stage", "cutover")
        if killer.migration().stage == "cutover":
            break
    else:
        killer.succeed("rollout", "--stage", "cutover")
    assert_all(kind.items(shadow), new, payloads)
    with Project.open(world.config) as project:
        counts = project.ledger.counts(killer.migration().id)
        assert set(counts.by_state) == {"done"}
        assert counts.open_failures == 0

    for _ in range(5):
        killer.kill(2 * part, "rollback")
        if killer.migration().state == "rolled_back":
            break
    else:
        killer.succeed("rollback")
    after = kind.items()
    assert_all(after, old, payloads)
    if not isinstance(kind, QdrantFolder):  # which normalises what it is given
        assert after == before
    if shadow is not None:
        assert not kind.exists(shadow)


STRATEGIES = pytest.mark.parametrize("strategy", ["in_place", "shadow"])
EVERY_KIND = pytest.mark.parametrize("make", [*KINDS, QdrantOverRest], ids=lambda kind: kind.name)


@pytest.mark.timeout(600)
@STRATEGIES
@EVERY_KIND
def test_killed_there_and_back(
    commands: Commands, first: World, tmp_path: Path, make: type[Kind], strategy: str
) -> None:
    killed_there_and_back(commands, first, tmp_path, make, strategy, kills=12)


@pytest.mark.long
@pytest.mark.timeout(3600)
@STRATEGIES
@EVERY_KIND
def test_killed_a_hundred_times(
    commands: Commands, first: World, tmp_path: Path, make: type[Kind], strategy: str
) -> None:
    killed_there_and_back(commands, first, tmp_path, make, strategy, kills=100)


# -- an application that never stops writing --------------------------------------------------------------------------


class Writer:
    """The application: a process that inserts, changes and deletes items until it is told to stop."""

    def __init__(self, kind: Kind, journal: Path) -> None:
        self.journal, world = journal, kind.world
        holds = {item: dict(found.payload) for item, found in kind.items().items()}
        journal.write_text(json.dumps({"holds": holds}) + "\n")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.writer", str(world.folder), str(journal)],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )

    def writes(self) -> int:
        """How often it has written."""
        return self.journal.read_text().count("\n") - 1

    def stop(self) -> dict[int, Any]:
        """Ends it at a whole operation; returns what must be there: id -> payload."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0
        last = json.loads(self.journal.read_text().splitlines()[-1])
        return {int(item): payload for item, payload in last["holds"].items()}


def beside_a_live_writer(
    commands: Commands, first: World, folder: Path, make: Make, strategy: str, seconds: float
) -> None:
    world = World(folder / "world")
    shutil.copytree(first.folder, world.folder)
    world.configure(rollout__strategy=strategy, backfill__retry_for=20.0)
    kind = make(world)
    with kind.running(folder / "server"):
        kind.use()
        for which in ("old", "new"):
            arrays: dict[str, Any] = vectors_by(world, which)
            np.savez(world.folder / f"{which}.npz", **arrays)
        killer = Killer(commands, world, 5)
        killer.to_backfill(strategy)
        writer = Writer(kind, folder / "journal")
        try:
            part = killer.succeed("backfill", "--max-items", "60")
            until, kills = monotonic() + seconds, 0
            while monotonic() < until or kills < 5 or writer.writes() < 20:
                assert monotonic() < until + 120, f"{kills} kills met a running backfill, {writer.writes()} writes"
                if kills < 5:
                    kills += not killer.kill(part, "backfill", "--max-items", "60")
                else:
                    killer.succeed("backfill", "--max-items", "60")
        finally:
            holds = writer.stop()
        killer.succeed("backfill")
        if strategy == "shadow":
            killer.canary()
        killer.succeed("rollout", "--stage", "cutover")
        assert_all(kind.items(killer.migration().shadow), vectors_by(world, "new"), holds)
        killer.succeed("rollback")
        assert_all(kind.items(), vectors_by(world, "old"), holds)


@pytest.mark.timeout(300)
@STRATEGIES
@EVERY_KIND
def test_beside_a_live_writer(
    commands: Commands, first: World, tmp_path: Path, make: type[Kind], strategy: str
) -> None:
    beside_a_live_writer(commands, first, tmp_path, make, strategy, seconds=1)


@pytest.mark.long
@pytest.mark.timeout(600)
@STRATEGIES
@EVERY_KIND
def test_beside_a_live_writer_for_long(
    commands: Commands, first: World, tmp_path: Path, make: type[Kind], strategy: str
) -> None:
    beside_a_live_writer(commands, first, tmp_path, make, strategy, seconds=30)
