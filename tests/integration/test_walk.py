"""The commands of a whole migration, on a real FAISS folder and a real ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from migrator.project import Project
from tests.world import NAME, World, embed_images, save_images, write_gallery

Migrator = Callable[..., int]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[[], Any]:
    def last() -> Any:
        return json.loads(capsys.readouterr().out)

    return last


def to_stage(migrator: Migrator, stage: str) -> None:
    assert migrator("plan") == 0
    assert migrator("verify") == 0
    if stage == "planned":
        return
    assert migrator("rollout", "--stage", "prepare") == 0
    if stage == "prepare":
        return
    assert migrator("rollout", "--stage", "canary") == 0
    if stage == "canary":
        return
    assert migrator("rollout", "--stage", "backfill") == 0
    if stage == "backfill":
        return
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0


def names_of(world: World) -> list[str]:
    return pq.read_table(world.gallery / "items.parquet").column("path").to_pylist()


def test_from_plan_to_finalize(world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> None:
    def status() -> dict[str, Any]:
        capsys.readouterr()
        assert migrator("status", "--json") == 0
        return json.loads(capsys.readouterr().out)

    world.configure(rollout__canary=[1, 10, 50, 100])
    assert status()["next_command"] == f"migrator plan {NAME}"
    assert migrator("plan") == 0
    assert status()["next_command"] == f"migrator verify {NAME}"
    assert migrator("verify") == 0
    assert status()["next_command"] == f"migrator rollout {NAME} --stage prepare"
    assert migrator("rollout", "--stage", "prepare") == 0
    for percent in (1, 10, 50, 100):
        assert migrator("rollout", "--stage", "canary") == 0
        assert status()["canary_percent"] == percent
    assert not status()["mixed_space"]
    assert migrator("rollout", "--stage", "backfill") == 0
    before = world.vectors()
    assert migrator("backfill", "--max-items", "35") == 0
    part = status()
    assert part["mixed_space"]
    assert (part["items_done"], part["items_total"]) == (40, 120)
    assert part["next_command"] == f"migrator backfill {NAME}"
    changed = (world.vectors() != before).any(axis=1)
    assert changed[:40].all()
    assert not changed[40:].any()
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert migrator("rollout", "--stage", "finalize") == 0
    end = status()
    assert (end["stage"], end["state"], end["items_done"], end["items_failed"]) == ("finalize", "finished", 120, 0)
    assert end["items_per_second"] > 0
    np.testing.assert_allclose(world.vectors(), embed_images(world, "new", names_of(world)), atol=1e-5)
    assert migrator("rollout", "--stage", "finalize", "--drop-old") == 0
    assert status()["next_command"] is None
    assert migrator("rollback") == 3


def test_the_route_tells_the_application_what_to_do_at_each_stage(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    from migrator.route import RouteClient

    world.configure(rollout__canary=[1, 10, 50, 100])
    to_stage(migrator, "prepare")
    with Project.open(world.config) as project:
        old, new = project.encoder_ids()
        client = RouteClient(project.config.ledger, NAME, ttl=0.0)
    keys = [f"user {number}" for number in range(400)]
    assert {client.choose(key).encoder for key in keys} == {old}
    seen: set[str] = set()
    for _ in range(4):
        assert migrator("rollout", "--stage", "canary") == 0
        moved = {key for key in keys if client.choose(key).encoder == new}
        assert seen <= moved, "a key that was moved went back"
        assert client.route().write_encoders == [old]
        seen = moved
    assert seen == set(keys)
    epoch = client.route().epoch
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert client.route().epoch > epoch
    assert client.route().query_encoder == new
    assert client.route().write_encoders == [new]
    assert migrator("rollback") == 0
    assert client.choose("user 1").encoder == old
    assert client.route().write_encoders == [old]
    client.close()
    capsys.readouterr()
    assert migrator("route", "--json") == 0
    assert json.loads(capsys.readouterr().out)["query_encoder"] == old


@pytest.mark.parametrize("stage", ["prepare", "canary", "backfill", "half", "cutover", "finalize"])
def test_rollback_from_every_stage_gives_the_old_index_back(world: World, migrator: Migrator, stage: str) -> None:
    before = (world.gallery / "index.faiss").read_bytes()
    to_stage(migrator, {"half": "backfill", "finalize": "cutover"}.get(stage, stage))
    if stage == "half":
        assert migrator("backfill", "--max-items", "50") == 0
    if stage == "finalize":
        assert migrator("rollout", "--stage", "finalize") == 0
    assert migrator("rollback") == 0
    assert (world.gallery / "index.faiss").read_bytes() == before
    assert migrator("rollback") == 3  # nothing is left to roll back
    with Project.open(world.config) as project:
        old, _ = project.encoder_ids()
        route = project.ledger.route(project.migration().collection)
        assert route is not None
        assert (route.query_encoder, route.canary_percent, route.write_encoders) == (old, 0, [old])
        with project.store() as store:
            assert all(stamp is None for stamp in store.read_stamps(range(120)).stamps)
    # and the way is free for another try, to the end
    to_stage(migrator, "cutover")


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "PQ6x4", "SQ8"])
def test_indexes_that_need_a_rebuild(
    world: World, migrator: Migrator, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gallery(world, range(120), names_of(world), factory=factory)
    world.configure(backfill__chunk_size=50)
    before = (world.gallery / "index.faiss").read_bytes()
    to_stage(migrator, "backfill")
    assert migrator("backfill") == 0
    published = (world.gallery / "index.faiss").read_bytes()
    assert (published == before) == (factory in ("HNSW8", "PQ6x4", "SQ8"))
    capsys.readouterr()
    assert migrator("rollout", "--stage", "cutover") == 0
    assert ("About to rebuild and publish the index, and make" in capsys.readouterr().err) == (published == before)
    fresh = embed_images(world, "new", names_of(world))
    if factory == "PQ6x4":  # coarse: what the index itself makes of these vectors
        index = faiss.read_index(str(world.gallery / "index.faiss"))
        fresh = index.sa_decode(index.sa_encode(fresh))
    np.testing.assert_allclose(world.vectors(), fresh, atol=0.02 if factory == "SQ8" else 1e-5)
    assert migrator("rollback") == 0
    assert (world.gallery / "index.faiss").read_bytes() == before


def test_items_that_arrive_change_and_go_are_caught_up_with(world: World, migrator: Migrator) -> None:
    to_stage(migrator, "backfill")
    assert migrator("backfill", "--max-items", "60") == 0
    # The application rebuilds its folder: ten new items, five gone, three with another image; with the old encoder.
    names = names_of(world)
    save_images(world.images, [f"new-{number}.png" for number in range(13)], np.random.default_rng(5))
    kept = [row for row in range(120) if row not in (3, 4, 5, 70, 71)]
    renamed = {row: f"new-{10 + place}.png" for place, row in enumerate((10, 20, 90))}
    ids = kept + list(range(500, 510))
    paths = [renamed.get(row, names[row]) for row in kept] + [f"new-{number}.png" for number in range(10)]
    write_gallery(world, ids, paths)
    after_edit = world.vectors()
    assert migrator("rollout", "--stage", "cutover") == 3
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    np.testing.assert_allclose(world.vectors(), embed_images(world, "new", paths), atol=1e-5)
    assert migrator("rollback") == 0
    np.testing.assert_array_equal(world.vectors(), after_edit)


def test_items_written_after_the_cutover_go_back_to_the_old_encoder(world: World, migrator: Migrator) -> None:
    import faiss

    to_stage(migrator, "cutover")
    names = names_of(world)
    old = embed_images(world, "old", names)
    # The application adds two items and changes the image of one, with the new encoder, as the route told it.
    save_images(world.images, ["late-0.png", "late-1.png", "late-2.png"], np.random.default_rng(6))
    fresh = embed_images(world, "new", ["late-0.png", "late-1.png", "late-2.png"])
    now = world.vectors()
    write_gallery(world, [*range(120), 900, 901], [*names[:7], "late-2.png", *names[8:], "late-0.png", "late-1.png"])
    index = faiss.IndexFlatIP(now.shape[1])
    index.add(np.concatenate([now[:7], fresh[2:], now[8:], fresh[:2]]))
    faiss.write_index(index, str(world.gallery / "index.faiss"))
    assert migrator("rollback") == 0
    back = world.vectors()
    np.testing.assert_array_equal(np.delete(back[:120], 7, axis=0), np.delete(old, 7, axis=0))
    expected = embed_images(world, "old", ["late-2.png", "late-0.png", "late-1.png"])
    np.testing.assert_allclose(back[[7, 120, 121]], expected, atol=1e-5)


def test_bad_images_are_dead_letters_and_can_be_retried(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    to_stage(migrator, "backfill")
    good = (world.images / "00011.png").read_bytes()
    (world.images / "00011.png").write_bytes(good[:40])
    (world.images / "00012.png").unlink()
    (world.images / "00013.png").write_bytes(b"")
    assert migrator("backfill") == 0
    capsys.readouterr()
    assert migrator("failures", "--json") == 0
    failures = json.loads(capsys.readouterr().out)["items"]
    assert [failure["id"] for failure in failures] == [11, 12, 13]
    assert all(failure["kind"] == "image" and "\n" not in failure["reason"] for failure in failures)
    assert migrator("rollout", "--stage", "cutover") == 3
    (world.images / "00011.png").write_bytes(good)
    assert migrator("failures", "--retry") == 0
    assert migrator("backfill") == 0
    capsys.readouterr()
    assert migrator("failures", "--json") == 0
    assert [failure["id"] for failure in json.loads(capsys.readouterr().out)["items"]] == [12, 13]
    assert migrator("rollout", "--stage", "cutover", "--max-failures", "1") == 3
    assert migrator("rollout", "--stage", "cutover", "--max-failures", "2") == 0


def test_pause_stops_new_runs_and_resume_lifts_it(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    to_stage(migrator, "backfill")
    assert migrator("pause", "--reason", "sale today") == 0
    before = world.vectors()
    capsys.readouterr()
    assert migrator("backfill") == 0
    assert "sale today" in capsys.readouterr().out
    np.testing.assert_array_equal(world.vectors(), before)
    assert migrator("resume") == 0
    assert migrator("resume") == 3
    assert migrator("backfill") == 0
    assert (world.vectors() != before).any(axis=1).all()


def test_queries_from_a_file_and_mixed_measurement(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["path,label", *(f"{number:05d}.png,kind {number % 3}" for number in range(50))]
    (world.folder / "queries.csv").write_text("\n".join(lines))
    world.configure(verify__queries="queries.csv")
    to_stage(migrator, "backfill")
    capsys.readouterr()
    assert migrator("verify", "--mixed", "--json") == 0
    before = json.loads(capsys.readouterr().out)["mixed"]
    with Project.open(world.config) as project:
        found = project.ledger.latest_verification(project.migration().id)
        assert found is not None
        tests = found.results["tests"]
    assert before == pytest.approx(tests["cross"])
    assert migrator("backfill") == 0
    capsys.readouterr()
    assert migrator("verify", "--mixed", "--json") == 0
    after = json.loads(capsys.readouterr().out)["mixed"]
    assert after == pytest.approx(tests["self"], abs=1e-3)
    assert migrator("verify") == 3  # the collection is mixed: no verdict any more
