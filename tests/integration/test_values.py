"""Payloads as people have them, from the command line: nested fields, lists of classes, folders, files of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from migrator.project import Project
from migrator.train.items import load_items
from tests.world import World, embed_images

Migrator = Callable[..., int]

TAGS = [["red", "shoes"], ["blue", "shoes"], ["blue", "hats"], [], ["hats", "all"]]


def with_column(world: World, name: str, values: list[Any]) -> None:
    table = pq.read_table(world.gallery / "items.parquet")
    pq.write_table(table.append_column(name, pa.array(values)), world.gallery / "items.parquet")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_nested_fields_from_plan_to_the_items_of_a_training(world: World, migrator: Migrator) -> None:
    table = pq.read_table(world.gallery / "items.parquet")
    nested = [
        {"source": f"{world.images}/{path}", "kind": {"name": kind}}
        for path, kind in zip(table["path"].to_pylist(), table["kind"].to_pylist(), strict=True)
    ]
    with_column(world, "metadata", nested)
    world.configure(images__uri="{metadata.source}", verify__label="{metadata.kind.name}")
    assert migrator("plan") == 0
    assert migrator("verify") == 0
    world.configure(train={"items": {"from": "store", "label": "{metadata.kind.name}"}})
    with Project.open(world.config) as project:
        items, _, _ = load_items(project, project.settings.train)  # type: ignore[arg-type]
    assert items.paths == tuple(table["path"].to_pylist())
    assert items.labels == tuple(table["kind"].to_pylist())


def test_items_that_share_a_tag_are_relevant_in_every_measurement(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = [TAGS[row % 5] for row in range(120)]
    with_column(world, "tags", tags)
    world.configure(verify__label="{tags}", verify__sample=500)
    assert migrator("plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["sampled"] == 96, "those that have tags"
    assert migrator("verify", "--live", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    old = embed_images(world, "old", [f"{row:05d}.png" for row in range(120)])
    scores = old @ old.T
    shared = np.array([[bool({*one} & {*other}) for other in tags] for one in tags])
    precisions = []
    for query in np.flatnonzero(shared.any(axis=1)):
        ranking = [item for item in np.lexsort((np.arange(120), -scores[query])) if item != query][:100]
        hits = shared[query, ranking]
        found = (np.cumsum(hits) / np.arange(1, 101))[hits].sum()
        precisions.append(found / min(100, shared[query].sum() - 1))
    assert document["tests"]["baseline"]["map@100"] == pytest.approx(np.mean(precisions), abs=2e-3)
    assert document["live"]["tests"]["baseline"]["map@100"] == pytest.approx(
        document["tests"]["baseline"]["map@100"], abs=2e-3
    )
    assert {group["name"] for group in document["classes"]["worst"]} == {"red", "blue", "all"}, "each by its rarest"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("{tags}", "field 'tags' is a list of several values; training needs one class"),
        ("{image}", "field 'image' is a structure with the fields bytes, path: name one"),
        ("{knd}", "no item with an image has a value for '{knd}': payloads have image.bytes, image.path, kind, path"),
    ],
)
def test_labels_that_training_cannot_take(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], label: str, words: str
) -> None:
    with_column(world, "tags", [["a", "b"]] * 120)
    with_column(world, "image", [{"bytes": b"\xff\xd8", "path": f"{row:05d}.png"} for row in range(120)])
    document = yaml.safe_load(world.config.read_text())
    document["migrations"]["toys"]["new_encoder"].pop("weights")
    document["migrations"]["toys"]["train"] = {"items": {"from": "store", "label": label}}
    world.config.write_text(yaml.safe_dump(document))
    if label == "{knd}":
        assert migrator("plan") == 0
        capsys.readouterr()
        assert migrator("train") == 2
    else:
        assert migrator("plan") == 2, "what no training could take is known before one begins"
    message = told(capsys)
    assert words in message
    if label == "{knd}":
        assert message.endswith('did you mean "{kind}"?')


def test_what_a_folder_holds_besides_is_said(
    world: World, migrator: Migrator, caplog: pytest.LogCaptureFixture
) -> None:
    for row, image in enumerate(sorted(world.images.iterdir())):
        if row < 20:
            folder = world.images / f"class {row % 2}"
            folder.mkdir(exist_ok=True)
            image.rename(folder / f"{image.stem}.png")
    world.configure(train={"items": {"from": "folders"}})
    with Project.open(world.config) as project:
        items, _, _ = load_items(project, project.settings.train)  # type: ignore[arg-type]
    assert len(items) == 20
    assert "20 images in folders; skipped 100: 100 images beside the folders, which have no class" in caplog.text
