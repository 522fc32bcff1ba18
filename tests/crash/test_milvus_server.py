"""A whole migration on a real Milvus server that is killed in the middle and comes back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.crash.commands import Commands
from tests.crash.test_stores import Killer, assert_all, vectors_by
from tests.kinds import MilvusOnAServer
from tests.milvus_server import milvus_server
from tests.world import World, make_world

pytestmark = [pytest.mark.crash, pytest.mark.long]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_the_server_is_killed_and_comes_back(tmp_path: Path, strategy: str) -> None:
    first = make_world(tmp_path / "first", items=120)
    with Commands() as commands, milvus_server(tmp_path / "milvus") as server:
        world = World(tmp_path / "world")
        shutil.copytree(first.folder, world.folder)
        world.configure(rollout__strategy=strategy, backfill__chunk_size=20)
        kind = MilvusOnAServer(world, server.uri)
        kind.use()
        payloads = {item: dict(found.payload) for item, found in kind.items().items()}
        killer = Killer(commands, world, 1)
        killer.to_backfill(strategy)
        killer.succeed("backfill", "--max-items", "40")
        address = server.uri
        commands.start(*killer.words("backfill"))
        commands.wait(2.0)
        server.kill()
        code = commands.wait(120.0)
        assert code in (4, 0), code  # it could not be reached: try again
        server.start()
        assert server.uri == address, "the configuration names the address"
        killer.succeed("backfill")
        if strategy == "shadow":
            killer.canary()
        killer.succeed("rollout", "--stage", "cutover")
        assert_all(kind.items(killer.migration().shadow), vectors_by(world, "new"), payloads)
        killer.succeed("rollback")
        assert_all(kind.items(), vectors_by(world, "old"), payloads)
