"""Whole migrations on a Qdrant server that makes trouble, by the commands that a user types."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from migrator.adapters.qdrant.points import STAMP
from migrator.project import Project
from tests.integration.test_stores import expected
from tests.kinds import QdrantOverRest
from tests.qdrant_front import Fault, Front, qdrant_front
from tests.world import World


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again without waiting."""
    monkeypatch.setattr("migrator.retry._backoff", lambda state: 0.0)


@dataclass
class Migrated:
    """The world's gallery on a server."""

    front: Front
    kind: QdrantOverRest
    world: World
    migrator: Callable[..., int]

    @contextlib.contextmanager
    def trouble(self) -> Iterator[None]:
        """One request in thirty goes wrong."""
        faults = [
            Fault("status", status=503),
            Fault("status", status=429, retry_after="0"),
            Fault("status", status=500),
            Fault("drop"),
            Fault("drop_after"),
            Fault("half"),
            Fault("torn"),
            Fault("garbage", path="/collections"),  # as the first answer of all it means another server
            Fault("acknowledged"),
        ]
        self.front.sprinkle(1 / 30, faults)
        yield
        self.front.heal()

    def again(self, *words: str) -> int:
        """Types a command until something else than the server is to blame."""
        for _ in range(50):
            code = self.migrator(*words)
            if code != 4:
                return code
        raise AssertionError(f"{words} never got through")

    def stages(self, *names: str) -> None:
        for name in names:
            assert self.again("rollout", "--stage", name) == 0


@pytest.fixture
def migrated(world: World, migrator: Callable[..., int]) -> Iterator[Migrated]:
    with qdrant_front() as front:
        kind = QdrantOverRest(world, front.url)
        kind.use()
        world.configure(backfill__retry_for=20.0)
        yield Migrated(front, kind, world, migrator)


@pytest.mark.usefixtures("at_once")
def test_in_place_there_and_back_through_trouble(migrated: Migrated) -> None:
    kind = migrated.kind
    before = kind.items()
    with migrated.trouble():
        assert migrated.again("plan") == 0
        assert migrated.again("verify") == 0
        migrated.stages("prepare", "canary", "backfill")
        assert migrated.again("backfill", "--max-items", "30") == 0
    kind.upsert_images([500, 3], ["00007.png", "00009.png"])
    kind.delete([2])
    with migrated.trouble():
        assert migrated.again("backfill") == 0
        migrated.stages("cutover")
    assert expected(kind, "new")
    assert set(kind.items()) == {*before, 500} - {2}
    with migrated.trouble():
        assert migrated.again("rollback") == 0
    assert expected(kind, "old")
    after = kind.items()
    assert all(after[item].near(before[item].vector) for item in set(before) - {2, 3})
    assert all(after[item].payload == before[item].payload for item in set(before) - {2, 3})
    with kind.opened() as store:
        assert not any(store.read_stamps(list(after)).stamps)
        assert STAMP not in migrated.front.qdrant.collection("toys").payload_schema


@pytest.mark.usefixtures("at_once")
def test_shadow_there_and_back_through_trouble(migrated: Migrated) -> None:
    kind, world = migrated.kind, migrated.world
    before = kind.items()
    world.configure(rollout__strategy="shadow")
    with migrated.trouble():
        assert migrated.again("plan") == 0
        assert migrated.again("verify") == 0
        migrated.stages("prepare", "backfill")
        assert migrated.again("backfill", "--max-items", "30") == 0
    with Project.open(world.config) as project:
        shadow = project.migration().shadow
    assert shadow is not None
    kind.upsert_images([500, 3], ["00007.png", "00009.png"])
    kind.delete([2])
    with migrated.trouble():
        assert migrated.again("backfill") == 0
        migrated.stages("canary", "cutover")
    old = kind.items("toys_v1")
    assert {item: old[item] for item in old if item not in (3, 500)} == {
        item: before[item] for item in before if item not in (2, 3)
    }
    assert expected(kind, "new", shadow)
    assert set(kind.items(shadow)) == {*before, 500} - {2}
    with kind.opened() as store:
        assert store.describe().collection_id == shadow
    # The application goes on with the new encoder, and then it is all taken back.
    kind.upsert_images([501, 6], ["00013.png", "00014.png"], "new")
    kind.delete([7])
    with migrated.trouble():
        assert migrated.again("rollback") == 0
    with kind.opened() as store:
        assert store.describe().collection_id == "toys_v1"
    assert not kind.exists(shadow)
    assert expected(kind, "old")
    assert set(kind.items()) == {*before, 500, 501} - {2, 7}


@pytest.mark.usefixtures("at_once")
def test_dropping_the_old_collection_through_trouble(migrated: Migrated) -> None:
    kind = migrated.kind
    migrated.world.configure(rollout__strategy="shadow")
    assert migrated.migrator("plan") == 0
    assert migrated.migrator("verify") == 0
    migrated.stages("prepare", "backfill")
    assert migrated.migrator("backfill") == 0
    migrated.stages("canary", "cutover", "finalize")
    migrated.front.fail("drop_after", path="DELETE /collections/toys_v1$")
    assert migrated.migrator("rollout", "--stage", "finalize", "--drop-old") == 4
    assert migrated.migrator("rollout", "--stage", "finalize", "--drop-old") == 0
    assert not kind.exists("toys_v1")
    assert expected(kind, "new")


def test_a_server_that_stays_down(migrated: Migrated, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 4 and one line, the chunk is free, and the next run goes on."""
    migrated.world.configure(backfill__retry_for=0.5)
    assert migrated.migrator("plan") == 0
    assert migrated.migrator("verify") == 0
    migrated.stages("prepare", "canary", "backfill")
    assert migrated.migrator("backfill", "--max-items", "30") == 0
    capsys.readouterr()
    # The writes of the second chunk that comes now never get through.
    migrated.front.fail("status", status=503, times=10**6, skip=1, path="points/batch")
    assert migrated.migrator("backfill") == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "answered with status 503" in error
    with Project.open(migrated.world.config) as project:
        migration = project.migration()
        assert project.ledger.live_leases(migration.id) == []
        assert project.ledger.counts(migration.id).by_state.get("failed", 0) == 0
    for verb in ("plan", "rollback"):
        migrated.front.heal()
        migrated.front.fail("drop", times=10**6)
        capsys.readouterr()
        assert migrated.migrator(verb) in ((4,) if verb == "rollback" else (3, 4))
        assert capsys.readouterr().err.splitlines()[-1].startswith("migrator: ")
    migrated.front.heal()
    assert migrated.migrator("backfill") == 0
    assert expected(migrated.kind, "new")


def test_commands_with_a_wrong_key(
    world: World, migrator: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with qdrant_front(api_key="right") as front:
        kind = QdrantOverRest(world, front.url, api_key="right")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the application's own client says that http is open to all
            kind.use()
        assert migrator("plan") == 0
        world.configure(store__api_key="wrong")
        for verb, code in (("plan", 2), ("verify", 2)):
            capsys.readouterr()
            assert migrator(verb) == code
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert "correct `api_key`" in error
            assert "wrong" not in error


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("what", ["half", "torn"])
def test_the_way_back_of_an_item_that_changed_after_it_was_half_written(migrated: Migrated, what: Any) -> None:
    """Between two attempts at a chunk the application changes the payload of an item that bears our vector already."""
    kind, front = migrated.kind, migrated.front
    before = kind.items()
    assert migrated.migrator("plan") == 0
    assert migrated.migrator("verify") == 0
    migrated.stages("prepare", "canary", "backfill")
    seen: list[str] = []

    def meddle(request: str, body: bytes) -> None:
        if request.endswith("/points/batch") and not seen:
            seen.append("half done")  # by the fault below
        elif request.endswith("/points/payload") and seen == ["half done"]:
            seen.append("changed")
            front.qdrant.client.set_payload("toys", {"kind": "kind 9"}, points=[1])

    front.before = meddle
    front.fail(what, path="/points/batch")
    assert migrated.migrator("backfill") == 0
    front.before = None
    assert seen == ["half done", "changed"]
    assert expected(kind, "new")
    assert kind.items()[1].payload["kind"] == "kind 9"
    assert migrated.migrator("rollback") == 0
    assert expected(kind, "old")
    assert all(item.near(before[key].vector) for key, item in kind.items().items())
