"""Workers that are frozen, or cut off from ledger or store, in the middle of a backfill, and come back after a rollback
or after another one took over."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

import numpy as np
import pytest
import yaml

from migrator.project import Project
from tests import postgres
from tests.crash.commands import Commands, faketime
from tests.crash.test_stores import Killer, vectors_by
from tests.kinds import Kind, MilvusOnAServer, QdrantOverRest
from tests.qdrant_front import qdrant_process
from tests.support.flaky_proxy import flaky_proxy
from tests.world import World, make_world

pytestmark = pytest.mark.crash

LEASE = 5  # the shortest that the configuration takes
ITEMS = 120


@pytest.fixture(scope="module")
def commands() -> Iterator[tuple[Commands, Commands]]:
    """For the worker that is frozen, and for whoever does not know of it."""
    with Commands() as worker, Commands() as other:
        yield worker, other


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("freeze") / "world", items=ITEMS)
    world.configure(
        backfill__chunk_size=10, backfill__lease=LEASE, backfill__read_back=0, backfill__measure=False,
        backfill__batch_size=2, backfill__nice=1.0,
    )  # fmt: skip
    return world


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with postgres.server() as url:
        yield url


class Frozen:
    """One collection on a server, whose worker is frozen again and again."""

    def __init__(self, commands: tuple[Commands, Commands], kind: Kind, seed: int) -> None:
        self.worker, self.other = (Killer(each, kind.world, seed) for each in commands)
        self.kind = kind
        self.rng = random.Random(seed)
        self.old, self.new = vectors_by(kind.world, "old"), vectors_by(kind.world, "new")
        self.frozen = self.locked = 0
        self.longest = 1.0

    def to_backfill(self, strategy: str) -> None:
        stages = ["prepare", *(["canary"] if strategy == "in_place" else []), "backfill"]
        self.run("plan")
        self.run("verify")
        for stage in stages:
            self.run("rollout", "--stage", stage)

    def catch(self, config: Path | None = None) -> bool:
        """Starts a backfill and returns at a random moment while it holds chunks; False where it was faster."""
        arguments = self.worker.words("backfill")
        if config is not None:
            arguments[arguments.index("--config") + 1] = str(config)
        self.worker.commands.start(*arguments)
        with Project.open(self.kind.world.config) as project:
            migration = project.migration()
            while not project.ledger.chunks(migration.id, "leased"):
                if self.worker.commands.wait(0.01) is not None:
                    return False
        return self.worker.commands.wait(self.rng.uniform(0, self.longest)) is None

    def freeze(self) -> bool:
        """Freezes a backfill; False where it was faster."""
        if not self.catch():
            return False
        self.worker.commands.freeze()
        self.frozen += 1
        return True

    def run(self, verb: str, *arguments: str) -> None:
        """By somebody else, with the worker frozen. A frozen process may hold a SQLite file, which is told."""
        code, _ = self.other.commands.run(*self.other.words(verb, *arguments))
        if code == 4:
            self.locked += 1
            self.thaw()
            code, _ = self.other.commands.run(*self.other.words(verb, *arguments))
        assert code == 0, f"{verb} ended with {code}"

    def thaw(self) -> None:
        self.worker.commands.thaw()
        code = self.worker.commands.wait(60.0)
        assert code in (0, 3, 4), f"the worker ended with {code}"

    def wrong(self, which: dict[str, np.ndarray], collection_id: str | None = None) -> int:
        """Items that do not hold the vector that they should."""
        items = self.kind.items(collection_id)
        assert len(items) == ITEMS
        return sum(not item.near(which[item.payload["path"]]) for item in items.values())


@contextmanager
def prepared(first: World, folder: Path, ledger: str | None, strategy: str) -> Iterator[World]:
    """A copy of the first world, with its ledger in a new database of a PostgreSQL server, or in a file."""
    world = World(folder / "world")
    shutil.copytree(first.folder, world.folder)
    world.configure(rollout__strategy=strategy, rollout__canary=[100])
    if ledger is not None:
        import psycopg

        database = f"freeze_{uuid4().hex}"
        with psycopg.connect(ledger.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
        document = yaml.safe_load(world.config.read_text())
        document["ledger"] = ledger.replace("/postgres?", f"/{database}?")
        world.config.write_text(yaml.safe_dump(document))
    yield world


@contextmanager
def running(first: World, folder: Path, version: str, ledger: str | None, strategy: str) -> Iterator[Kind]:
    with prepared(first, folder, ledger, strategy) as world, qdrant_process(version=version) as url:
        kind = QdrantOverRest(world, url)
        kind.use()
        world.configure(store__timeout=2)
        yield kind


def frozen_and_rolled_back(frozen: Frozen, strategy: str, trials: int) -> None:
    while frozen.frozen < trials:
        frozen.to_backfill(strategy)
        shadow = frozen.other.migration().shadow  # before: a frozen process may hold a SQLite file
        hit = frozen.freeze()
        frozen.run("rollback")
        if hit and frozen.worker.commands.running:
            frozen.thaw()
        assert frozen.wrong(frozen.old) == 0
        if shadow is not None:
            assert not frozen.kind.exists(shadow)


def frozen_and_taken_over(frozen: Frozen, strategy: str, trials: int) -> None:
    """The lease of the frozen worker ends, another one does its chunk and all others, and the cutover follows."""
    while frozen.frozen < trials:
        frozen.to_backfill(strategy)
        shadow = frozen.other.migration().shadow  # before: a frozen process may hold a SQLite file
        hit = frozen.freeze()
        code = 3
        while code == 3:  # stuck until the lease of the frozen one ends
            code, _ = frozen.other.commands.run(*frozen.other.words("backfill"))
        if code == 4:
            frozen.thaw()
            frozen.run("backfill")
        if strategy == "shadow":
            frozen.run("rollout", "--stage", "canary")
        frozen.run("rollout", "--stage", "cutover")
        if hit and frozen.worker.commands.running:
            frozen.thaw()
        assert frozen.wrong(frozen.new, shadow) == 0
        frozen.run("rollback")
        assert frozen.wrong(frozen.old) == 0


CASES = [("1.16.0", "in_place"), ("1.15.0", "in_place"), ("1.16.0", "shadow")]
ALL = [(version, strategy) for version in ("1.16.0", "1.15.0") for strategy in ("in_place", "shadow")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("version", "strategy"), CASES)
def test_a_frozen_worker_writes_nothing_after_a_rollback(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str, version: str, strategy: str
) -> None:
    with running(first, tmp_path, version, postgresql, strategy) as kind:
        frozen_and_rolled_back(Frozen(commands, kind, 0), strategy, trials=2)


@pytest.mark.timeout(600)
def test_a_frozen_worker_is_taken_over(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str
) -> None:
    with running(first, tmp_path, "1.15.0", postgresql, "in_place") as kind:
        frozen_and_taken_over(Frozen(commands, kind, 1), "in_place", trials=1)


@pytest.mark.timeout(600)
def test_a_worker_that_is_cut_off_from_the_ledger_writes_nothing_after_a_rollback(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str
) -> None:
    """Its network to the store is whole: only its own clock and what the ledger last said keep it from writing."""
    with running(first, tmp_path, "1.15.0", postgresql, "in_place") as kind:
        cut_off = Frozen(commands, kind, 2)
        document = yaml.safe_load(kind.world.config.read_text())
        socket, _, home = document["ledger"].partition("?host=")
        with flaky_proxy(f"{unquote(home)}/.s.PGSQL.5432") as proxy:
            document["ledger"] = socket.replace("@/", f"@127.0.0.1:{proxy.port}/")
            worker = kind.world.folder / "worker.yaml"
            worker.write_text(yaml.safe_dump(document))
            for _ in range(2):
                cut_off.to_backfill("in_place")
                caught = cut_off.catch(worker)
                proxy.cut()
                cut_off.run("rollback")
                assert cut_off.wrong(cut_off.old) == 0
                proxy.heal()
                if caught:
                    code = cut_off.worker.commands.wait(120.0)
                    assert code in (0, 3, 4), f"the worker ended with {code}"
                assert cut_off.wrong(cut_off.old) == 0


@pytest.mark.timeout(600)
def test_a_worker_that_is_cut_off_from_the_store_leaves_and_a_rollback_follows(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str
) -> None:
    with prepared(first, tmp_path, postgresql, "in_place") as world, qdrant_process(version="1.15.0") as url:
        target = ("127.0.0.1", int(url.rpartition(":")[2]))
        with flaky_proxy(target) as proxy:
            kind = QdrantOverRest(world, f"http://127.0.0.1:{proxy.port}")
            kind.use()
            world.configure(store__timeout=2)
            cut_off = Frozen(commands, kind, 6)
            cut_off.to_backfill("in_place")
            caught = cut_off.catch()
            proxy.cut()
            if caught:
                code = cut_off.worker.commands.wait(120.0)
                assert code in (0, 4), f"the worker ended with {code}"
            refused, _ = cut_off.other.commands.run(*cut_off.other.words("rollback"))
            assert refused == 4, "the store does not answer"
            proxy.heal()
            cut_off.run("rollback")
            assert cut_off.wrong(cut_off.old) == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ahead", [600, pytest.param(-600, marks=pytest.mark.long)])
def test_clocks_ten_minutes_apart_change_nothing(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str, ahead: int
) -> None:
    """Of the worker's machine and of everybody else's, the ledger's among them."""
    if faketime() is None:
        pytest.skip("libfaketime is not installed")
    with Commands(ahead=ahead) as worker, running(first, tmp_path, "1.15.0", postgresql, "in_place") as kind:
        clock = subprocess.check_output(["date", "+%s"], env=worker.environment)
        assert abs(int(clock) - ahead - time.time()) < 60
        shifted = Frozen((worker, commands[1]), kind, 8)
        frozen_and_rolled_back(shifted, "in_place", trials=1)
        frozen_and_taken_over(shifted, "in_place", trials=1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["1.15.0", "1.16.0"])
def test_a_request_that_arrives_after_the_rollback_changes_nothing(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str, version: str
) -> None:
    """The worker is frozen with its write on the way, as when a part of it is sent; no check of its own can help."""
    with (
        prepared(first, tmp_path, postgresql, "in_place") as world,
        qdrant_process(version=version) as url,
        flaky_proxy(("127.0.0.1", int(url.rpartition(":")[2]))) as proxy,
    ):
        kind = QdrantOverRest(world, f"http://127.0.0.1:{proxy.port}")
        kind.use()
        world.configure(store__timeout=2)
        late = Frozen(commands, kind, 7)
        late.to_backfill("in_place")
        proxy.hold(b"/points/batch")
        late.worker.commands.start(*late.worker.words("backfill"))
        assert proxy.held.wait(60.0)
        late.worker.commands.freeze()
        late.run("rollback")
        proxy.deliver()
        assert proxy.answered.wait(60.0)
        assert late.wrong(late.old) == 0
        late.thaw()
        assert late.wrong(late.old) == 0


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("ledger", ["postgresql", "sqlite"])
@pytest.mark.parametrize(("version", "strategy"), ALL)
def test_frozen_fifty_times(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str, version: str, strategy: str,
    ledger: str,
) -> None:  # fmt: skip
    url = postgresql if ledger == "postgresql" else None
    with running(first, tmp_path, version, url, strategy) as kind:
        frozen_and_rolled_back(Frozen(commands, kind, 3), strategy, trials=25)
        frozen_and_taken_over(Frozen(commands, kind, 4), strategy, trials=25)


@pytest.mark.long
@pytest.mark.milvus_server
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_frozen_beside_a_milvus_server(
    commands: tuple[Commands, Commands], first: World, tmp_path: Path, postgresql: str, strategy: str
) -> None:
    with prepared(first, tmp_path, postgresql, strategy) as world:
        kind = MilvusOnAServer(world)
        with kind.running(tmp_path / "server"):
            kind.use()
            world.configure(store__timeout=2)
            frozen_and_rolled_back(Frozen(commands, kind, 5), strategy, trials=50)
