"""A whole migration on a real Milvus server that is killed in the middle and comes back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from migrator.adapters.base import StoreRejected, StoreUnavailable
from migrator.adapters.registry import open_store
from migrator.project import Project
from tests.crash.commands import Commands
from tests.crash.test_stores import (
    STRATEGIES,
    Killer,
    assert_all,
    beside_a_live_writer,
    killed_there_and_back,
    vectors_by,
)
from tests.kinds import MilvusOnAServer
from tests.milvus_server import milvus_server
from tests.world import World, make_world

pytestmark = [pytest.mark.crash, pytest.mark.long]


@pytest.mark.timeout(900)
@STRATEGIES
def test_the_server_is_killed_and_comes_back(tmp_path: Path, strategy: str) -> None:
    """Once for longer than the run has patience, and once for less."""
    first = make_world(tmp_path / "first", items=120)
    with Commands() as commands, milvus_server(tmp_path / "milvus") as server:
        world = World(tmp_path / "world")
        shutil.copytree(first.folder, world.folder)
        world.configure(rollout__strategy=strategy, backfill__chunk_size=5, backfill__retry_for=2)
        kind = MilvusOnAServer(world, server.uri)
        kind.use()
        payloads = {item: dict(found.payload) for item, found in kind.items().items()}
        killer = Killer(commands, world, 1)
        killer.to_backfill(strategy)
        address = server.uri

        commands.start(*killer.words("backfill"))
        wait_until(world, done=20)
        server.kill()
        assert commands.wait(60.0) == 4, "it could not be reached: try again"
        with Project.open(world.config) as project:
            counts = project.ledger.counts(project.migration().id)
        assert counts.by_state.get("leased", 0) == 0, "no chunk waits for a lease to run out"
        assert 20 <= counts.done < 100
        server.start()
        assert server.uri == address, "the configuration names the address"
        wait_until_loaded(kind)

        world.configure(backfill__retry_for=120)
        commands.start(*killer.words("backfill"))
        wait_until(world, done=counts.done + 5)
        server.kill()
        server.start()
        assert commands.wait(120.0) == 0
        if strategy == "shadow":
            killer.canary()
        killer.succeed("rollout", "--stage", "cutover")
        assert_all(kind.items(killer.migration().shadow), vectors_by(world, "new"), payloads)
        killer.succeed("rollback")
        assert_all(kind.items(), vectors_by(world, "old"), payloads)


def wait_until_loaded(kind: MilvusOnAServer) -> None:
    """Until the server has its collections back, which it does by itself."""
    deadline, pause = monotonic() + 60.0, threading.Event()
    while True:
        try:
            with kind.opened():
                return
        except StoreUnavailable:
            assert monotonic() < deadline, "the server does not load its collection again"
        pause.wait(0.2)


def wait_until(world: World, *, done: int) -> None:
    """Until so many items are done, but not all of them."""
    deadline, pause = monotonic() + 60.0, threading.Event()
    with Project.open(world.config) as project:
        migration = project.migration()
        while (now := project.ledger.counts(migration.id).done) < done:
            assert monotonic() < deadline, f"{now} items are done"
            pause.wait(0.02)


@contextmanager
def served(folder: Path) -> Iterator[Callable[[World], MilvusOnAServer]]:
    """Makes kinds that share one server, a database for each."""

    class OnIt(MilvusOnAServer):
        @contextmanager
        def running(self, folder: Path) -> Iterator[None]:
            yield

    with milvus_server(folder / "milvus") as server:
        yield lambda world: OnIt(world, server.uri, database=world.folder.name)


@pytest.mark.timeout(900)
@STRATEGIES
def test_commands_are_killed(tmp_path: Path, strategy: str) -> None:
    first = make_world(tmp_path / "first", items=240)
    first.configure(backfill__chunk_size=20)
    with Commands() as commands, served(tmp_path) as make:
        killed_there_and_back(commands, first, tmp_path, make, strategy, kills=30)


@pytest.mark.timeout(900)
def test_beside_a_live_writer(tmp_path: Path) -> None:
    """With a shadow: in place this server writes whole rows, which `plan` says is not for such an application."""
    first = make_world(tmp_path / "first", items=240)
    first.configure(backfill__chunk_size=20)
    with Commands() as commands, served(tmp_path) as make:
        beside_a_live_writer(commands, first, tmp_path, make, "shadow", seconds=30)


def test_a_server_that_asks_for_credentials(tmp_path: Path) -> None:
    """Nothing is killed here, but it wants a server of its own."""
    with milvus_server(tmp_path, authorization_enabled=True) as guarded:
        config = {"kind": "milvus", "uri": guarded.uri, "collection": "x", "timeout": 5}
        for token in (None, "root:wrong", "nobody:x"):
            with pytest.raises(StoreRejected, match="refuses these credentials: correct `token`") as refusal:
                open_store({**config, **({} if token is None else {"token": token})}, write=True)
            assert "\n" not in str(refusal.value)
            assert token is None or token not in str(refusal.value)
        with pytest.raises(StoreRejected, match="no collection"):
            open_store({**config, "token": "root:Milvus"}, write=True)
