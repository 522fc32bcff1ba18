"""Question sets of a real collection: read from its index and items table, frozen in the artifacts, asked later."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from migrator.config import find_migration, load_config
from migrator.embedding.embed import embed
from migrator.errors import PreconditionFailed
from migrator.ledger import Migration
from migrator.project import Project
from migrator.verify.judged_queries import JudgedQueries
from migrator.verify.query_set.augmented import altered
from migrator.verify.query_set.model import QuerySet
from migrator.verify.query_set.pinned import pinned_query_set, read_pinned
from tests.world import NAME, World, write_gallery

MIGRATION = Migration(id=1, created_at=dt.datetime(2026, 11, 25, tzinfo=dt.UTC))


@contextmanager
def opened(world: World) -> Iterator[Project]:
    project = Project(load_config(world.config), *find_migration(load_config(world.config), NAME))
    try:
        yield project
    finally:
        project.close()


def frozen(world: World, *, resample: bool = False, **verify: Any) -> QuerySet:
    if verify:
        world.configure(verify={**verify, "gate": {"min_gain": -1.0}})
    with opened(world) as project, project.store() as store:
        return pinned_query_set(project, MIGRATION, store, project.images(), resample=resample)


def test_questions_are_those_of_the_first_day(world: World) -> None:
    first = frozen(world, label="{kind}", segment="{path}", sample=9, gallery=50)
    assert (first.kind, len(first.paths), len(first.gallery)) == ("labels", 9, 50)
    assert first.segments == first.paths
    assert first.paths == [f"{item:05d}.png" for item in first.own if isinstance(item, int)]
    # Half the collection goes, and what is left is another one.
    write_gallery(world, list(range(60)), [f"{number:05d}.png" for number in range(60)])
    later = frozen(world)
    assert later == first
    with opened(world) as project, project.store() as store:
        left = store.read_stamps(later.gallery).ids
    assert 50 - len(left) == sum(item >= 60 for item in first.gallery if isinstance(item, int)) > 0
    assert frozen(world, resample=True).sha256 != first.sha256


def everything(query_set: QuerySet) -> JudgedQueries:
    return JudgedQueries.of(query_set, np.arange(len(query_set.paths)), np.arange(len(query_set.gallery)))


def test_relevant_items_are_told_apart_by_type(world: World) -> None:
    names = [f"{number:05d}.png" for number in range(4)]
    write_gallery(world, ["0", "1", "2", "x"], names)
    (world.folder / "queries.csv").write_text('path,relevant\nq.png,"[""0"", ""x""]"\n00001.png,"[""1"", ""2""]"\n')
    drawn = frozen(world, queries="queries.csv", gallery=1)
    assert drawn.relevant == [{"0": 1.0, "x": 1.0}, {"2": 1.0}]
    assert drawn.own == [None, "1"]
    rows = everything(drawn)
    assert rows.relevant is not None
    assert [{drawn.gallery[row] for row in right} for right in rows.relevant] == [{"0", "x"}, {"2"}]
    (world.folder / "queries.csv").write_text("path,relevant\nq.png,[0]\n")
    with pytest.raises(PreconditionFailed, match="no longer the file"):
        frozen(world)


def test_items_ask_for_themselves_in_views_that_can_be_embedded(world: World) -> None:
    drawn = frozen(world, sample=5)
    assert drawn.kind == "instance"
    rows = everything(drawn)
    assert rows.relevant is not None
    assert [drawn.gallery_paths[row] for right in rows.relevant for row in right] == drawn.paths
    with opened(world) as project:
        encoder = project.load(project.old_spec())
        source = project.images()
        views = embed(source, drawn.paths, [encoder], view=partial(altered, seed=0), **project.loading())
        plain = embed(source, drawn.paths, [encoder], **project.loading())
    assert views.problems == {}
    likeness = (views.vectors[0] * plain.vectors[0]).sum(axis=1)
    assert (likeness < 0.9999).all(), "another picture each"


def test_artifacts_elsewhere_and_a_ledger_that_begins_anew(world: World) -> None:
    document = yaml.safe_load(world.config.read_text())
    world.config.write_text(yaml.safe_dump(document | {"artifacts": f"memory://{world.folder.name}-questions"}))
    first = frozen(world, label="{kind}", sample=6)
    other = Migration(id=1, created_at=MIGRATION.created_at + dt.timedelta(microseconds=1))
    with opened(world) as project:
        assert read_pinned(project, MIGRATION) == first
        assert read_pinned(project, other) is None


def test_a_write_that_fails_leaves_the_questions_of_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from migrator.errors import TemporarilyUnavailable

    first = frozen(world, label="{kind}", sample=6)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("migrator.artifacts.files.os.fsync", full)
        with pytest.raises(TemporarilyUnavailable, match="No space left on device"):
            frozen(world, resample=True, label="{kind}", sample=7)
    (file,) = (path for path in world.folder.rglob("query-set-*/*"))
    assert json.loads(file.read_text())["query_set"]["made_from"]["sample"] == 6
    assert frozen(world, label="{kind}", sample=6) == first


def test_a_column_of_lists_in_the_payload_gives_several_classes(world: World) -> None:
    table = pq.read_table(world.gallery / "items.parquet")
    tags = [["a", row] for row in table.column("kind").to_pylist()]
    pq.write_table(table.append_column("tags", [tags]), world.gallery / "items.parquet")
    drawn = frozen(world, label="{tags}", sample=6)
    assert set(drawn.labels or ()) == {f"kind {number}" for number in range(3)}, "a tag that all have does not count"
    assert drawn.labels == frozen(world, resample=True, label="{kind}", sample=6).labels


def test_the_file_of_queries_may_lie_anywhere(world: World, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.csv"
    file.write_text("path,label\nq1.png,kind 0\nq2.png,kind 1\n")
    drawn = frozen(world, queries=str(file), label="{kind}")
    assert drawn.made_from["queries"]["file"] == "elsewhere.csv"
    assert drawn.labels == ["kind 0", "kind 1"]
