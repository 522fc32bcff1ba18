"""A backfill that begins with the worst vectors, and its way back, by the commands that a user types."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrator.adapters.base import StoreUnavailable
from migrator.adapters.faiss.store import FaissStore
from migrator.backfill.order import worst_first_ids
from migrator.cli import run
from migrator.evaluation.ordering import worst_first
from migrator.ledger import Ledger
from migrator.project import Project
from tests.world import World, embed_images, make_world, save_images

ITEMS, SIZE = 60, 5


@dataclass
class Gallery:
    """What the application keeps in its folder: it reads and writes both files with faiss and pyarrow alone."""

    world: World
    ids: list[int]
    names: list[str]
    kinds: list[str]
    vectors: np.ndarray

    @classmethod
    def of(cls, world: World) -> Gallery:
        rows = pq.read_table(world.gallery / "items.parquet").to_pydict()
        return cls(world, rows["id"], rows["path"], rows["kind"], world.vectors())

    def put(self, item: int, name: str, which: str) -> None:
        """Inserts an item, or gives it another image, with a vector of that encoder."""
        (vector,) = embed_images(self.world, which, [name])
        if item in self.ids:
            row = self.ids.index(item)
            self.names[row], self.vectors[row] = name, vector
        else:
            self.ids.append(item)
            self.names.append(name)
            self.kinds.append("kind 0")
            self.vectors = np.concatenate([self.vectors, [vector]])

    def delete(self, item: int) -> None:
        row = self.ids.index(item)
        del self.ids[row], self.names[row], self.kinds[row]
        self.vectors = np.delete(self.vectors, row, axis=0)

    def write(self) -> None:
        index = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(self.vectors)
        faiss.write_index(index, str(self.world.gallery / "index.faiss"))
        table = pa.table({"id": self.ids, "path": self.names, "kind": self.kinds})
        pq.write_table(table, self.world.gallery / "items.parquet")

    def by_id(self) -> dict[int, np.ndarray]:
        return dict(zip(self.ids, self.vectors, strict=True))


def call(world: World, verb: str, *words: str) -> int:
    asks = verb in ("rollout", "backfill", "rollback")
    return run([verb, "--config", str(world.config), *words, *(["--yes"] if asks else [])])


class Stages:
    """One world, as it was at different stages: its paths are in the ledger, so it goes back to where it was."""

    def __init__(self, folder: Path) -> None:
        self.world = make_world(folder / "world", items=ITEMS)
        self.world.configure(backfill__chunk_size=SIZE, backfill__order="worst_first")
        # Even ids alone, so that others can be inserted between them.
        gallery = Gallery.of(self.world)
        gallery.ids = [2 * item for item in gallery.ids]
        gallery.write()
        self.before = gallery
        self.index = (self.world.gallery / "index.faiss").read_bytes()
        save_images(self.world.images, [f"late-{number}.png" for number in range(6)], np.random.default_rng(7))
        self._folder = folder

    def keep(self, stage: str) -> None:
        shutil.copytree(self.world.folder, self._folder / stage)

    def at(self, stage: str) -> World:
        shutil.rmtree(self.world.folder)
        shutil.copytree(self._folder / stage, self.world.folder)
        return self.world


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    stages = Stages(tmp_path_factory.mktemp("order"))
    world = stages.world
    assert call(world, "plan") == 0
    assert call(world, "verify") == 0
    assert call(world, "rollout", "--stage", "prepare") == 0
    assert call(world, "rollout", "--stage", "canary") == 0
    assert call(world, "rollout", "--stage", "backfill") == 0
    stages.keep("backfill")
    assert call(world, "backfill", "--max-items", "18") == 0
    stages.keep("half")
    return stages


def worst(gallery: Gallery) -> list[int]:
    """All ids, worst first: the order is by kind, as the configuration names it."""
    return [gallery.ids[row] for row in worst_first(gallery.vectors, gallery.kinds, seed=0)]


def lists(world: World) -> list[list[Any] | None]:
    with Project.open(world.config) as project:
        return [project.ledger.ids_of(chunk) for chunk in project.ledger.chunks(project.migration().id)]


def changed(world: World, before: Gallery) -> set[int]:
    now = Gallery.of(world).by_id()
    return {item for item, vector in before.by_id().items() if item in now and (now[item] != vector).any()}


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(found, expected, rtol=0, atol=1e-5)


def test_the_worst_items_come_first_and_the_cut_stays(stages: Stages) -> None:
    world, order = stages.at("half"), worst(stages.before)
    assert order != sorted(order)
    assert changed(world, stages.before) == set(order[:20])
    cut = [order[start : start + SIZE] for start in range(0, ITEMS, SIZE)]
    assert lists(world) == cut

    # The application goes on: all labels change, vectors that wait change places, items come and one goes.
    gallery = Gallery.of(world)
    gallery.kinds = [f"other {row % 7}" for row in range(ITEMS)]
    gallery.put(order[59], "late-0.png", "old")
    gallery.put(order[21], "late-1.png", "old")
    gallery.put(order[3], "late-2.png", "old")
    gallery.put(1, "late-3.png", "old")
    gallery.put(999, "late-4.png", "old")
    gallery.delete(order[22])
    gallery.write()
    assert call(world, "backfill", "--max-items", "18") == 0
    done = set(order[:40]) - {order[22], order[3]}
    now = Gallery.of(world)
    new = dict(zip(now.ids, embed_images(world, "new", now.names), strict=True))
    assert {item for item, vector in now.by_id().items() if same(vector, new[item])} == done
    assert lists(world) == cut

    assert call(world, "rollout", "--stage", "cutover") == 3
    assert call(world, "backfill") == 0
    now = Gallery.of(world)
    assert same(now.vectors, embed_images(world, "new", now.names))
    assert lists(world) == [*cut, None], "a pass that catches up is a range"
    with Project.open(world.config) as project:
        (caught_up,) = project.ledger.chunks_of_later_passes(project.migration().id)
        counts = project.ledger.counts(project.migration().id)
    assert caught_up.items == 3, "two that came, and one written over"
    assert (counts.planned, counts.written) == (ITEMS, ITEMS - 1 + 3), "each once, and that one twice"
    assert call(world, "rollout", "--stage", "cutover") == 0
    assert call(world, "rollback") == 0
    back = Gallery.of(world)
    assert same(back.vectors, embed_images(world, "old", back.names))
    touched = {order[59], order[21], order[3], 1, 999}
    old = stages.before.by_id()
    assert all((back.by_id()[item] == old[item]).all() for item in set(back.ids) - touched)


@contextmanager
def cut_off(owner: type, name: str, after: int) -> Iterator[None]:
    """While it lasts a method fails, but for its first calls."""
    real, calls = getattr(owner, name), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise StoreUnavailable("the plug was pulled")
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(Ledger, "set_restored", 0), (Ledger, "set_restored", 2), (FaissStore, "write_vectors", 2)],
)
def test_half_way_and_back(stages: Stages, owner: type, name: str, after: int) -> None:
    world = stages.at("half")
    with cut_off(owner, name, after):
        assert call(world, "rollback") == 4
    assert call(world, "rollback") == 0
    assert (world.gallery / "index.faiss").read_bytes() == stages.index


@pytest.fixture(scope="module")
def gone(stages: Stages) -> int:
    """An item that was deleted before the backfill came to it, at the stage `cutover`."""
    world, item = stages.at("half"), worst(stages.before)[30]
    gallery = Gallery.of(world)
    gallery.delete(item)
    gallery.write()
    assert call(world, "backfill") == 0
    assert call(world, "rollout", "--stage", "cutover") == 0
    stages.keep("cutover")
    return item


def test_after_the_cutover_and_back(stages: Stages, gone: int) -> None:
    world = stages.at("cutover")
    assert call(world, "rollback") == 0
    back, old = Gallery.of(world), stages.before.by_id()
    assert set(back.ids) == set(old) - {gone}
    assert all((vector == old[item]).all() for item, vector in back.by_id().items())


@pytest.mark.parametrize(
    ("owner", "name", "after"), [(Ledger, "set_restored", 7), (FaissStore, "clear_migration_state", 0)]
)
def test_what_the_application_wrote_after_the_cutover(
    stages: Stages, gone: int, owner: type, name: str, after: int
) -> None:
    world, order = stages.at("cutover"), worst(stages.before)
    gallery = Gallery.of(world)
    written = {order[0]: "late-0.png", order[-1]: "late-1.png", 1: "late-2.png", 999: "late-3.png", gone: "late-4.png"}
    for item, image in written.items():
        gallery.put(item, image, "new")
    gallery.write()
    with cut_off(owner, name, after):
        assert call(world, "rollback") == 4
    assert call(world, "rollback") == 0
    back, old = Gallery.of(world), stages.before.by_id()
    assert set(back.ids) == {*old, 1, 999}
    assert all((vector == old[item]).all() for item, vector in back.by_id().items() if item not in written)
    found = np.stack([back.by_id()[item] for item in written])
    assert same(found, embed_images(world, "old", list(written.values())))


def test_without_labels_the_nearest_cluster_counts(stages: Stages) -> None:
    world = stages.at("backfill")
    with Project.open(world.config) as project, project.store() as store:
        first, again = (worst_first_ids(store, None, seed=0) for _ in range(2))
        other = worst_first_ids(store, lambda *_: "one class", seed=0)
    assert first == again
    assert sorted(first) == sorted(other) == sorted(stages.before.ids)
    assert first != other
