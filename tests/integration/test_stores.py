"""Whole migrations on every store, in place and with a shadow, by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from migrator.project import Project
from migrator.route import RouteClient
from tests.kinds import KINDS, FaissFolder, Kind, MilvusLite
from tests.support.forked import run_command
from tests.world import NAME, World, embed_images

Call = Callable[..., int]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest, world: World) -> Kind:
    kind: Kind = request.param(world)
    kind.use()
    return kind


def names(kind: Kind) -> list[str]:
    return [item.payload["path"] for item in kind.items().values()]


def expected(kind: Kind, which: str, collection_id: str | None = None) -> bool:
    """Every item has the vector of its image by that encoder."""
    items = kind.items(collection_id)
    vectors = embed_images(kind.world, which, [item.payload["path"] for item in items.values()])
    return all(item.near(vector) for item, vector in zip(items.values(), vectors, strict=True))


def to_prepared(migrator: Call) -> None:
    assert migrator("plan") == 0
    assert migrator("verify") == 0
    assert migrator("rollout", "--stage", "prepare") == 0


def canary(migrator: Call) -> None:
    assert migrator("rollout", "--stage", "canary") == 0


def test_in_place_there_and_back(kind: Kind, migrator: Call, capsys: pytest.CaptureFixture[str]) -> None:
    in_place_there_and_back(kind, migrator)
    out, err = capsys.readouterr()
    # A store that makes a written vector visible at once has no index that is published or that takes room.
    has_index_file = isinstance(kind, FaissFolder)
    assert ("About to publish the index and make the new encoder the only one" in err) == has_index_file
    assert ("About to make the new encoder the only one" in err) == (not has_index_file)
    assert ("next to the index" in out) == has_index_file
    assert "for the undo log" in out


def in_place_there_and_back(kind: Kind, migrator: Call) -> None:
    before = kind.items()
    assert expected(kind, "old")
    to_prepared(migrator)
    canary(migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill", "--max-items", "30") == 0
    # The application goes on meanwhile: an item comes, one is changed, one goes.
    kind.upsert_images([500, 3], ["00007.png", "00009.png"])
    kind.delete([2])
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert expected(kind, "new")
    assert set(kind.items()) == {*before, 500} - {2}
    assert migrator("rollback") == 0
    assert expected(kind, "old")
    after = kind.items()
    untouched = set(before) - {2, 3}
    assert all(after[item] == before[item] or after[item].near(before[item].vector) for item in untouched)
    with kind.opened() as store:
        assert not any(store.read_stamps(list(after)).stamps)


def prepared_shadow(world: World, migrator: Call) -> str:
    world.configure(rollout__strategy="shadow")
    to_prepared(migrator)
    with Project.open(world.config) as project:
        shadow = project.migration().shadow
    assert shadow is not None
    return shadow


def route(world: World) -> RouteClient:
    return RouteClient(f"sqlite:///{world.folder}/migrator.db", NAME, ttl=0)


def test_shadow_there_and_back(kind: Kind, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]) -> None:
    before = kind.items()
    with kind.opened() as store:
        source, alias = store.describe().collection_id, store.describe().alias
    shadow = prepared_shadow(world, migrator)
    assert not kind.exists(shadow)
    assert migrator("rollout", "--stage", "canary") == 3  # there is nothing to send queries to
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill", "--max-items", "30") == 0
    assert migrator("rollout", "--stage", "canary") == 3  # not everything is copied
    kind.upsert_images([500, 3], ["00007.png", "00009.png"])
    kind.delete([2])
    assert migrator("backfill") == 0
    assert kind.items() == {**{item: before[item] for item in before if item not in (2, 3)}, **some(kind, 3, 500)}
    assert expected(kind, "new", shadow)
    assert set(kind.items(shadow)) == {*before, 500} - {2}

    client = route(world)
    with Project.open(world.config) as project:
        old_id, new_id = project.encoder_ids()
    assert [(w.encoder, w.collection) for w in client.writes()] == [(old_id, source)]
    canary(migrator)
    assert [(w.encoder, w.collection) for w in client.writes()] == [(old_id, source), (new_id, shadow)]
    assert (client.choose("k").encoder, client.choose("k").collection) == (new_id, shadow)
    # What an application without dual writes does in the window is found, and the cutover waits for it.
    kind.upsert_images([4], ["00011.png"])
    kind.delete([5])
    assert migrator("rollout", "--stage", "cutover") == 3
    assert "4, 5" in capsys.readouterr().err
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert [(w.encoder, w.collection) for w in client.writes()] == [(new_id, shadow)]
    assert (client.choose("k").encoder, client.choose("k").collection) == (new_id, shadow)
    client.close()
    with kind.opened() as store:
        assert store.describe().collection_id == (shadow if alias else source)
    assert kind.exists(source)
    assert expected(kind, "old", source)
    assert expected(kind, "new", shadow)

    # After the cutover the application writes to the shadow alone. A rollback brings it all home.
    old_items = kind.items(source)
    if alias:
        kind.upsert_images([501, 6], ["00013.png", "00014.png"], "new")
        kind.delete([7])
    assert migrator("rollout", "--stage", "finalize") == 0
    capsys.readouterr()
    assert migrator("rollback", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["re_encoded"], result["removed"], result["problems"]) == ((2, 1, {}) if alias else (0, 0, {}))
    with kind.opened() as store:
        assert (store.describe().collection_id, store.describe().alias) == (source, alias)
    assert not kind.exists(shadow)
    assert expected(kind, "old")
    after = kind.items()
    if alias:
        assert set(after) == {*old_items, 501} - {7}
        assert after[6].payload["path"] == "00014.png"
    assert all(after[item].near(old_items[item].vector) for item in set(old_items) - {6, 7})
    capsys.readouterr()
    assert migrator("status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "rolled_back"


def some(kind: Kind, *ids: int) -> dict[int, object]:
    items = kind.items()
    return {item: items[item] for item in ids}


def test_the_old_collection_goes_only_when_told(kind: Kind, world: World, migrator: Call) -> None:
    with kind.opened() as store:
        source, alias = store.describe().collection_id, store.describe().alias
    shadow = prepared_shadow(world, migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    canary(migrator)
    assert migrator("rollout", "--stage", "cutover") == 0
    assert migrator("rollout", "--stage", "finalize") == 0
    assert kind.exists(source)
    assert migrator("rollout", "--stage", "finalize", "--drop-old") == 0
    if alias:
        assert not kind.exists(source)
        assert expected(kind, "new")
        assert kind.exists(shadow)
    assert migrator("rollback") == 3


def test_a_rollback_before_the_cutover_leaves_nothing_behind(kind: Kind, world: World, migrator: Call) -> None:
    before = kind.items()
    shadow = prepared_shadow(world, migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    canary(migrator)
    assert migrator("rollback") == 0
    assert kind.items() == before
    assert not kind.exists(shadow)
    # And the next one may begin.
    assert prepared_shadow(world, migrator) != shadow
    assert migrator("rollback") == 0


def test_a_shadow_may_have_another_dimension(
    kind: Kind, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.saving import save_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing

    spec = EncoderSpec(arch="test_resnet", dim=40, preprocessing=Preprocessing(image_size=16))
    torch.manual_seed(5)
    save_encoder(build_model(spec), spec, world.folder / "wide.safetensors")
    world.configure(new_encoder={"arch": "test_resnet", "weights": "wide.safetensors", "dim": 40, "image_size": 16})
    assert migrator("plan") == 2
    assert "rollout.strategy to shadow" in capsys.readouterr().err
    shadow = prepared_shadow(world, migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    canary(migrator)
    assert migrator("rollout", "--stage", "cutover") == 0
    items = kind.items(shadow)
    assert {len(item.vector) for item in items.values()} == {40}
    assert all(abs(np.linalg.norm(item.vector) - 1) < 1e-5 for item in items.values())
    assert migrator("rollback") == 0
    assert expected(kind, "old")


@pytest.fixture
def without_room(world: World) -> Kind:
    """A collection whose schema has no room for stamps."""
    kind = MilvusLite(world, dynamic=False)
    kind.use()
    return kind


def test_in_place_without_room_for_stamps(
    without_room: Kind, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, before = without_room, without_room.items()
    assert migrator("plan") == 0
    assert "kept as digests in the artifacts folder" in capsys.readouterr().out
    in_place_there_and_back(kind, migrator)
    after = kind.items()
    assert {item: after[item] for item in set(before) - {2, 3}} == {item: before[item] for item in set(before) - {2, 3}}
    assert not list((world.folder / "artifacts").rglob("stamps-*"))


def test_a_stamp_log_that_lost_files(
    without_room: Kind, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    to_prepared(migrator)
    canary(migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill", "--max-items", "30") == 0
    (folder,) = (world.folder / "artifacts").rglob("stamps-*")
    kept = sorted(folder.iterdir())[0]
    content = kept.read_bytes()
    halves = [lambda: kept.unlink(), lambda: kept.write_bytes(content[: len(content) // 2])]
    for damage in halves:
        damage()
        items = without_room.items()
        capsys.readouterr()
        for verb in ("backfill", "rollback"):
            assert migrator(verb) == 3
            error = capsys.readouterr().err
            assert "restore this" in error
            assert "Traceback" not in error
        assert without_room.items() == items
        kept.write_bytes(content)
    assert migrator("rollback") == 0
    assert expected(without_room, "old")


@pytest.mark.parametrize(
    ("store", "code", "says"),
    [
        ({"kind": "milvus", "uri": "./nowhere.db", "collection": "toys"}, 2, "does not exist"),
        ({"kind": "milvus", "uri": "http://127.0.0.1:1", "collection": "toys", "timeout": 2}, 4, "did not answer"),
        ({"kind": "qdrant", "url": "http://127.0.0.1:1", "collection": "toys", "timeout": 2}, 4, "did not answer"),
        ({"kind": "qdrant", "path": "./images", "collection": "toys"}, 2, "holds no local Qdrant"),
        ({"kind": "qdrant", "engine": "edge", "path": "./images", "collection": "toys"}, 2, "toys"),
        ({"kind": "faiss", "path": "./nowhere"}, 2, "nowhere"),
        ({"kind": "faiss", "path": "./loop"}, 2, "loop"),
    ],
)
def test_a_store_that_is_not_there(
    world: World, migrator: Call, capsys: pytest.CaptureFixture[str], store: dict[str, object], code: int, says: str
) -> None:
    (world.folder / "loop").symlink_to("pool")
    (world.folder / "pool").symlink_to("loop")
    world.configure(store=store)
    refused_in_one_line(migrator, capsys, code, says)


def refused_in_one_line(migrator: Call, capsys: pytest.CaptureFixture[str], code: int, says: str) -> None:
    capsys.readouterr()
    assert migrator("plan") == code
    printed = capsys.readouterr()
    first, *table = [line for line in printed.err.splitlines() if not line.startswith("sampling: ")]
    assert says in first
    assert not [line for line in table if not line.startswith("  ")]
    assert printed.out == ""


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"store__collection": "tois"}, 2, "'tois'"),
        ({"store__vector": "picture"}, 2, "'picture'"),
        ({"old_encoder__dim": 32, "new_encoder__dim": 32}, 2, "holds 24-d vectors but encoder test_resnet gives 32"),
        ({"new_encoder__dim": 32}, 2, "rollout.strategy to shadow"),
        ({"old_encoder__weights": "new.safetensors"}, 3, "were not made by this encoder"),
    ],
)
def test_a_store_that_is_not_what_the_configuration_says(
    kind: Kind, world: World, migrator: Call, capsys: pytest.CaptureFixture[str], change: Any, code: int, says: str
) -> None:
    if isinstance(kind, FaissFolder) and any(key.startswith("store__") for key in change):
        pytest.skip("a FAISS folder is one collection with one vector each")
    before = kind.items()
    good = world.config.read_text()
    world.configure(**change)
    refused_in_one_line(migrator, capsys, code, says)
    world.config.write_text(good)
    assert kind.items() == before
    assert migrator("plan") == 0


def test_a_collection_of_nothing(kind: Kind, migrator: Call, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(kind, FaissFolder):
        pytest.skip("tested among the guards")
    kind.delete(list(range(120)))
    refused_in_one_line(migrator, capsys, 3, "is empty")


def test_vectors_that_are_no_directions(kind: Kind, migrator: Call, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(kind, FaissFolder):
        pytest.skip("tested among the guards")
    items = kind.items()
    zeros = np.zeros((120, len(items[0].vector)), np.float32)
    kind.put(list(items), zeros, [dict(item.payload) for item in items.values()])
    refused_in_one_line(migrator, capsys, 3, "holds a vector that is zero or not finite")


def test_a_store_that_another_process_has_open(kind: Kind, world: World, migrator: Call) -> None:
    if not kind.exclusive:
        pytest.skip("several processes may open it")
    to_prepared(migrator)
    canary(migrator)
    assert migrator("rollout", "--stage", "backfill") == 0

    def run(verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        return run_command(verb, "--config", str(world.config), *more)

    def told(done: subprocess.CompletedProcess[str]) -> list[str]:
        """Without the lines that say every few seconds how far it is, on a machine that is that slow."""
        return [line for line in done.stderr.splitlines() if not line.endswith(": started")]

    with kind.opened():
        looked = run("verify", "--mixed")
        assert (looked.returncode, looked.stdout, len(told(looked))) == (4, "", 1), looked.stderr
        assert "open in another process" in looked.stderr
        backfilled = run("backfill", "--yes")  # by cron, while another run is still going on
        assert backfilled.returncode == 0
        assert "another run is in progress" in backfilled.stdout
        assert len(told(backfilled)) == 1, backfilled.stderr  # what it is about to do
    assert run("backfill", "--yes").returncode == 0
    assert expected(kind, "new")
