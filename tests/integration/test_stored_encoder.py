"""`old_encoder: stored`: a migration where nothing is left of the old encoder but the vectors it made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator.errors import ConfigError, PreconditionFailed
from migrator.project import Project
from migrator.train.items import load_items
from tests.world import DIM, World, embed_images, save_images, write_gallery

Migrator = Callable[..., int]
Printed = Callable[..., tuple[int, str, str]]

NAMES = [f"{number:05d}.png" for number in range(120)]


@pytest.fixture
def lost(world: World) -> World:
    """A world whose old model is nowhere to be found, in few steps."""
    world.configure(old_encoder="stored", rollout__canary=[100], backfill__chunk_size=60)
    (world.folder / "old.safetensors").unlink()
    (world.folder / "old.json").unlink()
    return world


@pytest.fixture
def printed(migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Runs a command; exit code, stdout and stderr."""

    def call(verb: str, *words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = migrator(verb, *words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def vectors_in(gallery: Path) -> np.ndarray:
    import faiss

    index = faiss.read_index(str(gallery / "index.faiss"))
    return index.reconstruct_n(0, index.ntotal)


def rewrite(gallery: Path, ids: Sequence[int], names: Sequence[str], vectors: np.ndarray) -> None:
    """The application writes a folder anew."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    faiss.write_index(index, str(gallery / "index.faiss"))
    table = pa.table({"id": list(ids), "path": list(names), "kind": [f"kind {row % 3}" for row in range(len(ids))]})
    pq.write_table(table, gallery / "items.parquet")


def to_cutover(migrator: Migrator, strategy: str = "in_place") -> None:
    assert migrator("plan") == migrator("verify") == migrator("rollout", "--stage", "prepare") == 0
    canary = ("rollout", "--stage", "canary")
    opened = [("rollout", "--stage", "backfill"), ("backfill",)]
    for words in [canary, *opened] if strategy == "in_place" else [*opened, canary]:
        assert migrator(*words) == 0
    assert migrator("rollout", "--stage", "cutover") == 0


def test_from_plan_to_cutover_and_back_without_the_old_model(lost: World, migrator: Migrator, printed: Printed) -> None:
    before = (lost.gallery / "index.faiss").read_bytes()
    lost.configure(
        new_encoder={"arch": "test_resnet", "dim": DIM, "image_size": 16},
        train={"items": {"from": "store", "label": "{kind}"}, "epochs": 1, "batch_size": 54, "image_threads": 1},
    )
    code, out, _ = printed("plan", "--json")
    plan = json.loads(out)
    old = plan["old_encoder"]["id"]
    assert code == 0
    assert old.startswith("stored-")
    assert plan["old_encoder_check"] == {"sampled": 0, "median_cosine": None}
    assert sum("stored" in risk or "rollback cannot embed" in risk for risk in plan["risks"]) == 3
    code, out, err = printed("train")
    assert code == 0, err
    assert all(test in out for test in ("self", "cross", "reverse"))
    to_cutover(migrator)
    with Project.open(lost.config) as project:
        route = project.ledger.route(project.migration().collection)
        assert route is not None
        assert route.query_encoder == project.encoder_ids()[1] != old
    code, out, _ = printed("rollback", "--json")
    assert code == 0
    assert json.loads(out) | {"migration": ""} == {
        "format": 1, "migration": "", "restored": 120, "re_encoded": 0, "removed": 0, "stale": [], "kept_shadow": None,
        "problems": {},
    }  # fmt: skip
    assert (lost.gallery / "index.faiss").read_bytes() == before
    assert json.loads(printed("route", "--json")[1])["query_encoder"] == old
    assert json.loads(printed("plan", "--json")[1])["old_encoder"]["id"] == old, "the application knows it by this id"


def test_in_place_what_was_written_after_the_cutover_is_put_back_or_named(
    lost: World, migrator: Migrator, printed: Printed
) -> None:
    before = lost.vectors()
    to_cutover(migrator)
    # The application adds an item and gives another a new image, with the new encoder, as the route told it.
    save_images(lost.images, ["late-0.png", "late-1.png"], np.random.default_rng(6))
    fresh = embed_images(lost, "new", ["late-0.png", "late-1.png"])
    now = lost.vectors()
    now[7] = fresh[0]
    rewrite(
        lost.gallery,
        [*range(120), 900],
        [*NAMES[:7], "late-0.png", *NAMES[8:], "late-1.png"],
        np.append(now, fresh[1:], 0),
    )
    code, out, _ = printed("rollback", "--json")
    found = json.loads(out)
    assert code == 3
    assert (found["restored"], found["re_encoded"], found["stale"]) == (120, 0, [7])
    assert found["problems"] == {"900": "old_encoder is stored, there is no model; it keeps the new encoder's vector"}
    np.testing.assert_array_equal(lost.vectors()[:120], before)
    np.testing.assert_allclose(lost.vectors()[120], fresh[1], atol=1e-6)


@pytest.mark.parametrize("arrived", [False, True])
def test_a_shadow_that_alone_holds_items_is_kept_by_a_rollback(
    lost: World, migrator: Migrator, printed: Printed, arrived: bool
) -> None:
    before = lost.vectors()
    lost.configure(rollout__strategy="shadow")
    to_cutover(migrator, "shadow")
    (shadow,) = lost.folder.glob("gallery__*")
    # The application writes to the shadow alone: another path, and perhaps a new item.
    names, ids, vectors = [*NAMES[:7], NAMES[8], *NAMES[8:]], [*range(120)], vectors_in(shadow)
    if arrived:
        save_images(lost.images, ["late.png"], np.random.default_rng(6))
        late = embed_images(lost, "new", ["late.png"])
        names, ids, vectors = [*names, "late.png"], [*ids, 900], np.append(vectors, late, 0)
    rewrite(shadow, ids, names, vectors)
    code, out, _ = printed("rollback", "--json")
    found = json.loads(out)
    assert code == 3
    assert (found["re_encoded"], found["removed"], found["stale"]) == (0, 0, [7])
    assert list(found["problems"]) == (["900"] if arrived else [])
    assert found["kept_shadow"] == (str(shadow) if arrived else None)
    assert shadow.exists() is arrived
    np.testing.assert_array_equal(lost.vectors(), before)
    assert pq.read_table(lost.gallery / "items.parquet").column("path").to_pylist() == [
        *NAMES[:7],
        NAMES[8],
        *NAMES[8:],
    ]


def test_queries_are_asked_with_their_stored_vectors(world: World, migrator: Migrator, printed: Printed) -> None:
    rows = "".join(f"{name},kind {number % 3}\n" for number, name in enumerate(NAMES[:50]))
    (world.folder / "queries.csv").write_text(f"path,label\n{rows}")
    world.configure(verify__queries="queries.csv", verify__gallery=60)  # half of the queries are not in the gallery
    assert migrator("plan") == 0
    by_model = json.loads(printed("verify", "--json")[1])

    world.configure(old_encoder="stored")
    save_images(world.images, ["stranger.png"], np.random.default_rng(8))
    (world.folder / "queries.csv").write_text(f"path,label\nstranger.png,kind 1\n{rows}")
    assert migrator("plan") == 0
    assert "queries.csv is no longer the file" in printed("verify")[2]
    code, out, _ = printed("verify", "--resample-queries", "--json")
    by_vectors = json.loads(out)
    assert code == 0
    assert (by_model["queries_without_old_vector"], by_vectors["queries_without_old_vector"]) == (0, 1)
    assert by_vectors["queries"] == by_model["queries"] == 50
    assert by_vectors["tests"] == by_model["tests"]
    assert "1 queries were excluded" in printed("verify")[1]

    (world.folder / "queries.csv").write_text("path,label\nstranger.png,kind 1\nanother.png,kind 2\n")
    code, out, err = printed("verify", "--resample-queries")
    assert (code, out) == (3, "")
    assert "none of 2 queries, for instance 'stranger.png', is an item of faiss:" in err


def test_the_new_vectors_must_be_as_long_as_those_in_the_collection(lost: World, printed: Printed) -> None:
    lost.configure(new_encoder__dim=32)
    code, out, err = printed("plan")
    assert (code, out) == (2, "")
    assert "holds 24-d vectors but encoder test_resnet gives 32: set new_encoder.dim to 24 or rollout.strategy" in err


def test_vectors_of_another_encoder_are_not_the_old_one(lost: World, migrator: Migrator, printed: Printed) -> None:
    def planned() -> str:
        return json.loads(printed("plan", "--json")[1])["old_encoder"]["id"]

    old = planned()
    vectors = lost.vectors()
    vectors[:5] = embed_images(lost, "new", NAMES[5:10])  # the application replaced a few images
    rewrite(lost.gallery, range(120), NAMES, vectors)
    assert planned() == old
    assert migrator("verify") == 0
    rewrite(lost.gallery, range(120), NAMES, embed_images(lost, "new", NAMES))
    for words in [("verify",), ("rollout", "--stage", "prepare")]:
        code, _, err = printed(*words)
        assert code == 3
        assert f"the stored vectors are no longer those of {old}" in err
    assert planned() != old
    assert printed("rollout", "--stage", "prepare")[0] == 3, "what was verified is another old encoder"


def test_a_model_that_was_lost_on_the_way_does_not_bar_the_way_back(
    world: World, printed: Printed, migrator: Migrator
) -> None:
    before = (world.gallery / "index.faiss").read_bytes()
    world.configure(rollout__canary=[100], backfill__chunk_size=60)
    to_cutover(migrator)
    (world.folder / "old.safetensors").unlink()
    world.configure(old_encoder="stored")
    assert printed("rollback")[0] == 0
    assert (world.gallery / "index.faiss").read_bytes() == before


# -- what is trained on ---------------------------------------------------------------------------------------------


def items_of(world: World, items: Any) -> Any:
    world.configure(train={"items": items})
    with Project.open(world.config) as project:
        assert project.settings.train is not None
        return load_items(project, project.settings.train)


def test_training_items_come_with_their_stored_vectors(lost: World) -> None:
    expected = lost.vectors()
    vectors = expected.copy()
    vectors[[3, 4]] = [[0.0] * DIM, [np.nan] * DIM]
    vectors[5] *= 3
    rewrite(lost.gallery, range(120), [*NAMES[:-1], NAMES[11]], vectors)

    items, found, excluded = items_of(lost, {"from": "store", "label": "{kind}"})
    rows = [row for row in range(119) if row not in (3, 4)]
    assert items.paths == tuple(NAMES[row] for row in rows)
    assert items.labels == tuple(f"kind {row % 3}" for row in rows)
    np.testing.assert_allclose(found, expected[rows], atol=1e-6)
    assert [each.path for each in excluded] == [NAMES[3], NAMES[4]]

    assert items_of(lost, {"from": "store"})[0].labels is None
    with pytest.raises(ConfigError, match=r"train\.items\.label: no item with an image has a value for '{knd}'"):
        items_of(lost, {"from": "store", "label": "{knd}"})


def test_training_items_of_a_file_are_joined_by_path(lost: World) -> None:
    (lost.folder / "train.csv").write_text("path,label\n00009.png,b\nelsewhere.png,a\n00002.png,a\n")
    items, found, excluded = items_of(lost, "train.csv")
    assert (items.paths, items.labels) == (("00009.png", "00002.png"), ("b", "a"))
    np.testing.assert_allclose(found, lost.vectors()[[9, 2]], atol=1e-6)
    assert [each.path for each in excluded] == ["elsewhere.png"]

    (lost.folder / "train.csv").write_text(f"path\n./00009.png\n{lost.images}/00002.png\n")
    items, found, _ = items_of(lost, "train.csv")
    assert items.paths == ("00009.png", "00002.png")
    np.testing.assert_allclose(found, lost.vectors()[[9, 2]], atol=1e-6)

    (lost.folder / "train.csv").write_text("path\nnew/00009.png\nnew/00002.png\n")
    with pytest.raises(
        PreconditionFailed, match=r"none of the 2 training images, for instance 'new/00009.png', is an item of faiss"
    ):
        items_of(lost, "train.csv")


def test_training_items_of_folders(world: World) -> None:
    names = [f"{kind}/{number}.png" for kind in ("boots", "hats") for number in range(4)]
    for kind in ("boots", "hats"):
        save_images(world.images / kind, [f"{number}.png" for number in range(4)], np.random.default_rng(1))
    write_gallery(world, range(8), names)
    items, vectors, excluded = items_of(world, {"from": "folders"})
    assert (items.paths, vectors, excluded) == (tuple(names), None, [])
    assert items.labels == ("boots",) * 4 + ("hats",) * 4
    world.configure(old_encoder="stored")
    np.testing.assert_allclose(items_of(world, {"from": "folders"})[1], world.vectors(), atol=1e-6)
    world.configure(images__root="s3://bucket/images")
    with pytest.raises(ConfigError, match="only folders of this machine can be walked"):
        items_of(world, {"from": "folders"})
