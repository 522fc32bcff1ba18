"""What cannot be done for one item or chunk holds up nothing else, is listed with its reason, and can be retried."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from migrator.adapters.base import ItemId, Page, StoreRejected
from migrator.project import Project
from tests.integration.test_stores import canary, expected, to_prepared
from tests.kinds import KINDS, Kind
from tests.world import World

Call = Callable[..., int]

BAD = 33  # in the fourth of twelve chunks


STRATEGIES = ("in_place", "shadow")


def pairs(*strategies: Sequence[str]) -> pytest.MarkDecorator:
    """Runs a test with these strategies, in the order of the kinds of store."""
    found = [(strategy, kind) for kind, some in zip(KINDS, strategies, strict=True) for strategy in some]
    return pytest.mark.parametrize("opened", found, ids=[f"{it}-{kind.name}" for it, kind in found], indirect=True)


@pytest.fixture
def opened(request: pytest.FixtureRequest, world: World, migrator: Call) -> Kind:
    """The backfill may begin, with the strategy and in the kind of store named."""
    strategy, make = request.param
    kind: Kind = make(world)
    kind.use()
    world.configure(rollout__strategy=strategy)
    to_prepared(migrator)
    if strategy == "in_place":
        canary(migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    return kind


@pytest.fixture
def failures(migrator: Call, capsys: pytest.CaptureFixture[str]) -> Callable[[], Any]:
    def ask() -> Any:
        capsys.readouterr()
        assert migrator("failures", "--json") == 0
        return json.loads(capsys.readouterr().out)

    return ask


def shadow_of(world: World) -> str | None:
    with Project.open(world.config) as project:
        return project.migration().shadow


def to_the_end(kind: Kind, world: World, migrator: Call, failures: Callable[[], Any]) -> None:
    """The cause is gone."""
    assert migrator("failures", "--retry") == 0
    assert migrator("backfill") == 0
    assert failures()["items"] == failures()["chunks"] == []
    if shadow_of(world):
        canary(migrator)
    assert migrator("rollout", "--stage", "cutover") == 0
    assert expected(kind, "new", shadow_of(world))


# What is wrong here and with the chunk below is no matter of the store: one strategy each, and both between them.
@pairs(["in_place"], ["shadow"], ["in_place"], ["shadow"])
def test_an_image_that_never_decodes(opened: Kind, world: World, migrator: Call, failures: Callable[[], Any]) -> None:
    image = world.images / f"{BAD:05d}.png"
    good = image.read_bytes()
    image.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    before = opened.items()[BAD]
    for _ in range(2):
        assert migrator("backfill") == 0
        (failed,) = failures()["items"]
        assert (failed["id"], failed["kind"]) == (BAD, "image")
        assert failed["reason"]
    assert opened.items()[BAD] == before
    done = opened.items(shadow_of(world))
    assert len(done) == (119 if shadow_of(world) else 120)
    image.write_bytes(good)
    to_the_end(opened, world, migrator, failures)


@pairs(*[STRATEGIES] * len(KINDS))
def test_an_item_that_the_store_refuses(
    opened: Kind, world: World, migrator: Call, failures: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = opened.items()[BAD]
    with opened.refusing(BAD, monkeypatch):
        assert migrator("backfill") == 0
    (failed,) = failures()["items"]
    assert (failed["id"], failed["kind"]) == (BAD, "store")
    assert "too strange" in failed["reason"]
    assert failures()["chunks"] == []
    assert opened.items()[BAD] == before
    assert migrator("rollout", "--stage", "cutover") == 3
    to_the_end(opened, world, migrator, failures)


@contextmanager
def refusing_chunks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every write of a batch with the bad item is refused as a whole."""
    adapter = kind.adapter()
    write, insert = adapter.write_vectors, adapter.insert

    def refuse(ids: Sequence[ItemId]) -> None:
        if BAD in ids:
            raise StoreRejected("the shard is read only")

    def write_vectors(self: Any, ids: Sequence[ItemId], *more: Any, **options: Any) -> Any:
        refuse(ids)
        return write(self, ids, *more, **options)

    def insert_page(self: Any, page: Page) -> Any:
        refuse(page.ids)
        return insert(self, page)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "write_vectors", write_vectors)
        patch.setattr(adapter, "insert", insert_page)
        yield


@pairs(["shadow"], ["in_place"], ["shadow"], ["in_place"])
def test_a_chunk_that_fails_five_times(
    opened: Kind,
    world: World,
    migrator: Call,
    failures: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with refusing_chunks(opened, monkeypatch):
        for attempt in range(1, 6):
            assert failures()["chunks"] == []
            assert migrator("backfill") == 3, f"attempt {attempt}"
        (failed,) = failures()["chunks"]
        assert "read only" in failed["error"]
        assert failed["items"] == 10
        assert migrator("backfill") == 3  # nothing is tried any more
        capsys.readouterr()
        assert migrator("rollout", "--stage", "cutover" if shadow_of(world) is None else "canary") == 3
        assert "migrator" in capsys.readouterr().err
    with Project.open(world.config) as project:
        states = project.ledger.counts(project.migration().id).by_state
    assert states == {"done": 11, "failed": 1}
    items, new = opened.items(shadow_of(world)), expected_new(opened)
    assert {item for item, found in items.items() if found.near(new[item])} == set(range(120)) - set(range(30, 40))
    to_the_end(opened, world, migrator, failures)


def expected_new(kind: Kind) -> dict[Any, Any]:
    from tests.world import embed_images

    items = kind.items()
    names = [item.payload["path"] for item in items.values()]
    return dict(zip(items, embed_images(kind.world, "new", names), strict=True))
