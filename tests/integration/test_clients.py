"""Nothing is deleted, and no new vector written, while a client may still answer with an earlier row of the route."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest

from migrator.ledger import Ledger
from migrator.ledger import ledger as ledger_module
from tests.integration.test_walk import to_stage
from tests.unit.test_ledger import clock  # noqa: F401 - a fixture
from tests.world import NAME, World

Migrator = Callable[..., int]
Sleeps = list[float]


@pytest.fixture
def on_sleep(monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]) -> Callable[[Callable[[], None]], Sleeps]:  # noqa: F811
    """Lets every wait for clients pass at once, by the ledger's clock too, after calling what is given."""

    def install(meanwhile: Callable[[], None]) -> Sleeps:
        slept: Sleeps = []

        def sleep(seconds: float) -> None:
            meanwhile()
            slept.append(seconds)
            clock(seconds)

        monkeypatch.setattr("migrator.rollout.clients.time.sleep", sleep)
        return slept

    return install


def ledger_of(world: World) -> Ledger:
    return Ledger(f"sqlite:///{world.folder}/migrator.db")


def shadows(world: World) -> list[str]:
    return [folder.name for folder in world.folder.glob("gallery__*")]


def fill_shadow(world: World, migrator: Migrator, *, canaries: int) -> None:
    world.configure(rollout__strategy="shadow", rollout__route_ttl=5, rollout__canary=[50, 100])
    for words in (["plan"], ["verify"], ["rollout", "--stage", "prepare"], ["rollout", "--stage", "backfill"]):
        assert migrator(*words) == 0
    assert migrator("backfill") == 0
    for _ in range(canaries):
        assert migrator("rollout", "--stage", "canary") == 0


def report(world: World, name: str, epoch: int) -> None:
    with closing(ledger_of(world)) as ledger:
        (collection,) = [row.collection for row in [ledger.migration(NAME)] if row]
        ledger.report_client(collection, f"another host:1/7/{name}", name=name, epoch=epoch, ttl=5)


def epoch_of(world: World) -> int:
    with closing(sqlite3.connect(world.folder / "migrator.db")) as raw:
        return int(raw.execute("SELECT epoch FROM migrator_route WHERE migration = ?", [NAME]).fetchone()[0])


def test_a_rollback_deletes_the_shadow_only_when_no_client_can_search_it(
    world: World, migrator: Migrator, on_sleep: Callable[..., Sleeps], capsys: pytest.CaptureFixture[str]
) -> None:
    fill_shadow(world, migrator, canaries=1)
    before = epoch_of(world)
    for name in ("search-1", "search-2"):
        report(world, name, before)
    held = iter([3, 2])  # polls after which each client reports the new row

    def meanwhile() -> None:
        assert shadows(world), "the shadow went while a client could search it"
        if next(held, None) is None:
            for name in ("search-1", "search-2"):
                report(world, name, epoch_of(world))

    slept = on_sleep(meanwhile)
    capsys.readouterr()
    assert migrator("rollback") == 0
    said = capsys.readouterr().err
    assert f"2 clients still answer with epoch {before} (search-1, search-2): waiting for their next report" in said
    assert 6 < slept[0] <= 7
    assert shadows(world) == []


def test_before_the_canary_no_client_knows_the_shadow_and_nobody_is_waited_for(
    world: World, migrator: Migrator, on_sleep: Callable[..., Sleeps]
) -> None:
    fill_shadow(world, migrator, canaries=0)
    slept = on_sleep(lambda: None)
    assert migrator("rollback") == 0
    assert (slept, shadows(world)) == ([], [])


def test_a_killed_rollback_waits_again(
    world: World, migrator: Migrator, on_sleep: Callable[..., Sleeps], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_shadow(world, migrator, canaries=1)

    def killed(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("migrator.rollout.clients.time.sleep", killed)
    assert migrator("rollback") == 130
    assert shadows(world)
    slept = on_sleep(lambda: None)
    assert migrator("rollback") == 0
    assert 6 < slept[0] <= 7
    assert shadows(world) == []


def test_drop_old_deletes_the_old_collection_only_when_no_client_can_search_it(
    world: World, migrator: Migrator, on_sleep: Callable[..., Sleeps]
) -> None:
    fill_shadow(world, migrator, canaries=2)
    assert migrator("rollout", "--stage", "cutover") == 0

    def meanwhile() -> None:
        assert world.gallery.exists()

    slept = on_sleep(meanwhile)
    assert migrator("rollout", "--stage", "finalize", "--drop-old") == 0
    assert 0 < slept[0] <= 7
    assert not world.gallery.exists()


def test_no_new_vector_is_written_while_a_client_may_send_old_queries(
    world: World, migrator: Migrator, on_sleep: Callable[..., Sleeps]
) -> None:
    world.configure(rollout__route_ttl=5, rollout__canary=[50, 100])
    to_stage(migrator, "prepare")
    for _ in range(2):
        assert migrator("rollout", "--stage", "canary") == 0

    def meanwhile() -> None:
        assert migrator("backfill") == 3, "the stage is not open yet"

    slept = on_sleep(meanwhile)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert 0 < slept[0] <= 7
    assert migrator("backfill") == 0
    slept = on_sleep(lambda: None)
    assert migrator("rollout", "--stage", "cutover") == 0
    assert 0 < slept[0] <= 7, "an application that writes after the command writes new vectors"


def test_with_a_ttl_of_0_nobody_is_waited_for(
    world: World, migrator: Migrator, on_sleep: Callable[..., Sleeps]
) -> None:
    slept = on_sleep(lambda: None)
    to_stage(migrator, "backfill")
    assert ledger_module.SEARCH > 0
    assert slept == []
