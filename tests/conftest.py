"""Fixtures for all tests. A world is made once a session and copied for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# Two test workers share two cores: more threads a process only stand in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# Its asserts explain themselves only if pytest hears of it before anything imports it.
pytest.register_assert_rewrite("migrator.adapters.testing")

from migrator.cli import run  # noqa: E402
from migrator.ledger import Ledger  # noqa: E402
from tests.world import World, make_world  # noqa: E402


@pytest.fixture(scope="session")
def _first_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    # An empty ledger, which takes a command as long to make as all else that it does. The tests of ledgers make theirs.
    Ledger(f"sqlite:///{world.folder / 'migrator.db'}").close()
    return world


@pytest.fixture
def world(_first_world: World, tmp_path: Path) -> World:
    """A fresh copy of the small world."""
    folder = tmp_path / "world"
    shutil.copytree(_first_world.folder, folder)
    return World(folder)


@pytest.fixture
def migrator(world: World) -> Callable[..., int]:
    """Runs a command on the world and returns its exit code: migrator("rollout", "--stage", "prepare")."""

    def call(verb: str, *words: str) -> int:
        asks = verb in ("train", "rollout", "backfill", "rollback", "pause", "resume") or "--retry" in words
        return run([verb, "--config", str(world.config), *words, *(["--yes"] if asks else [])])

    return call
