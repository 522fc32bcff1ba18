"""Ledger, artifacts and collection of an earlier version, left in the middle of a backfill, are continued.

`tests/fixtures/ledger_0005` was written by the last version with a ledger 0005: `plan`, `verify`, the stages up to
`backfill`, and one `backfill --max-items 40` on the 120 items of `tests.world`. `{folder}` stands for the world's
folder.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from migrator.ledger.ledger import SCHEMA
from migrator.lifecycle.status import status_of
from migrator.project import Project
from tests.world import World, embed_images

FIXTURES = Path(__file__).parents[1] / "fixtures" / "ledger_0005"
Migrator = Callable[..., int]


def put_back(world: World, strategy: str) -> None:
    """The world as the earlier version left it."""
    saved = FIXTURES / strategy
    (world.folder / "migrator.db").unlink()
    shutil.rmtree(world.gallery)
    shutil.copytree(saved, world.folder, dirs_exist_ok=True)
    with closing(sqlite3.connect(world.folder / "migrator.db")) as ledger:
        ledger.executescript((saved / "ledger.sql").read_text().replace("{folder}", str(world.folder)))
    # The verification was made when the fixture was.
    world.configure(rollout__strategy=strategy, verify__max_age="36500d")


def vectors_of(gallery: Path) -> dict[str, np.ndarray]:
    import faiss

    index = faiss.read_index(str(gallery / "index.faiss"))
    names = pq.read_table(gallery / "items.parquet").column("path").to_pylist()
    return dict(zip(names, index.reconstruct_n(0, index.ntotal), strict=True))


@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_a_backfill_begun_by_an_earlier_version_is_finished(world: World, migrator: Migrator, strategy: str) -> None:
    put_back(world, strategy)
    with Project.open(world.config) as project:
        before = status_of(project)
        with closing(sqlite3.connect(world.folder / "migrator.db")) as ledger:
            assert ledger.execute("SELECT * FROM migrator_schema").fetchone() == (SCHEMA,)
    assert (before.items_done, before.items_total, before.verification) == (40, 120, "pass")
    assert before.next_command == "migrator backfill toys"
    assert migrator("backfill") == 0
    if strategy == "shadow":
        assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert migrator("rollout", "--stage", "finalize", "--drop-old") == 0
    with Project.open(world.config) as project:
        after = status_of(project)
    gallery = world.gallery if after.shadow is None else Path(after.shadow)
    found = vectors_of(gallery)
    expected = embed_images(world, "new", list(found))
    assert len(found) == 120
    np.testing.assert_allclose(np.stack(list(found.values())), expected, atol=1e-5)


@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_a_backfill_begun_by_an_earlier_version_is_rolled_back(world: World, migrator: Migrator, strategy: str) -> None:
    old = vectors_of(world.gallery)
    put_back(world, strategy)
    assert migrator("backfill", "--max-items", "20") == 0
    assert migrator("rollback") == 0
    found = vectors_of(world.gallery)
    assert found.keys() == old.keys()
    np.testing.assert_allclose([found[name] for name in old], list(old.values()), atol=1e-5)
    assert [path.name for path in world.folder.glob("gallery__*")] == []
