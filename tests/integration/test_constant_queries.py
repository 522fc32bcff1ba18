"""An application that asks without pause while the migration moves: no answer fails, none is mixed.

Every query is an image that the collection holds, embedded with the encoder that the route names and asked in the
collection that the route names. Its own item must come first, at distance nought: of two unrelated encoders nothing
else gives that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from migrator.project import Project
from migrator.route import RouteClient
from tests.integration.test_stores import canary, to_prepared
from tests.kinds import SHARED, Kind, MilvusOnAServer
from tests.world import NAME, World, embed_images

Call = Callable[..., int]


@pytest.fixture(params=[*SHARED, pytest.param(MilvusOnAServer, marks=pytest.mark.long)], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Iterator[Kind]:
    kind: Kind = request.param(world)
    with kind.running(tmp_path):
        kind.use()
        yield kind


class Application:
    """Asks in a thread of its own, until `stop`."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.epochs: dict[int, int] = {}
        """Epoch of the route -> answers."""
        self.by_alias = 0
        self.problems: list[str] = []
        self._stop = threading.Event()
        names = [f"{number:05d}.png" for number in range(120)]
        with Project.open(kind.world.config) as project:
            ids = project.encoder_ids()
        self.vectors = dict(zip(ids, (embed_images(kind.world, which, names) for which in ("old", "new")), strict=True))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        route = RouteClient(f"sqlite:///{self.kind.world.folder}/migrator.db", NAME)  # with the ttl of the route
        try:
            with self.kind.searching() as search:
                number = 0
                while not self._stop.wait(0.002):  # a pause: without one this thread takes a core
                    number = (number + 7) % 120
                    choice = route.choose(str(number))
                    item, score = search(choice.collection, self.vectors[choice.encoder][number])
                    if item != number or score < 0.999:
                        self.problems.append(f"epoch {choice.epoch}: asked for {number}, got {item} with {score}")
                    self.epochs[choice.epoch] = self.epochs.get(choice.epoch, 0) + 1
                    search(self.kind.alias(), self.vectors[choice.encoder][number])
                    self.by_alias += 1
        except BaseException as problem:
            self.problems.append(repr(problem))
        finally:
            route.close()

    def wait_for(self, answers: int) -> None:
        """Until there are so many more answers."""
        until, deadline = self.by_alias + answers, monotonic() + 60
        pause = threading.Event()
        while self.by_alias < until and not self.problems:
            assert monotonic() < deadline, "the application does not get on"
            pause.wait(0.01)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def asking(kind: Kind) -> Iterator[Application]:
    application = Application(kind)
    try:
        application.wait_for(5)
        yield application
        application.wait_for(5)
    finally:
        application.stop()
    assert application.problems == []
    assert application.by_alias >= 10


def test_a_shadow_is_filled_cut_over_and_taken_back(kind: Kind, world: World, migrator: Call) -> None:
    """With an application that keeps a row for half a second: nothing is deleted that its row still names."""
    world.configure(rollout__strategy="shadow", rollout__route_ttl=0.5, rollout__canary=[50, 100])
    to_prepared(migrator)
    with asking(kind) as application:
        assert migrator("rollout", "--stage", "backfill") == 0
        assert migrator("backfill") == 0
        for _ in range(2):
            assert migrator("rollout", "--stage", "canary") == 0
            application.wait_for(3)
        assert migrator("rollout", "--stage", "cutover") == 0
        application.wait_for(10)
        assert migrator("rollback") == 0
    assert len(application.epochs) >= 3


def test_an_in_place_cutover(kind: Kind, migrator: Call) -> None:
    to_prepared(migrator)
    canary(migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    with asking(kind) as application:
        assert migrator("rollout", "--stage", "cutover") == 0
    assert len(application.epochs) == 2


@pytest.mark.parametrize("kind", SHARED[:1], indirect=True, ids=lambda kind: kind.name)
def test_a_shadow_is_taken_back_from_the_canary(kind: Kind, world: World, migrator: Call) -> None:
    """Nothing else delays the deletion here: without the wait for clients a search meets a collection that is gone."""
    world.configure(rollout__strategy="shadow", rollout__route_ttl=0.5, rollout__canary=[100])
    to_prepared(migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "canary") == 0
    with asking(kind):
        assert migrator("rollback") == 0
