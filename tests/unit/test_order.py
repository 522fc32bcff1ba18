from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.adapters.base import ItemId, Page, order_key
from migrator.adapters.iterate import pages
from migrator.backfill import order as module
from migrator.backfill.order import worst_first_ids
from migrator.errors import UsageProblem
from migrator.evaluation import ordering
from migrator.evaluation.ordering import distance_to_centroid, worst_first

DIM = 4
NAN, INF = float("nan"), float("inf")
labels_of = st.lists(st.sampled_from(["a", "b", "7", "", "é✓ {x}"]), min_size=1, max_size=40)


class Items:
    """A store that answers a scan in pages of a few items, in the total order of ids."""

    def __init__(self, items: dict[ItemId, tuple[np.ndarray, str]]) -> None:
        self.items = dict(sorted(items.items(), key=lambda pair: order_key(pair[0])))
        self.scans = 0

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        self.scans += after is None
        rest = [item for item in self.items if after is None or order_key(item) > order_key(after)]
        return self._page(rest[:limit])

    def read_vectors(self, ids: list[ItemId]) -> Page:
        return self._page(ids)

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        return list(self.items)[:n]

    def _page(self, ids: list[ItemId]) -> Page:
        vectors = np.array([self.items[item][0] for item in ids], np.float32).reshape(len(ids), DIM)
        return Page(ids, vectors, [{"kind": self.items[item][1]} for item in ids], [None] * len(ids))


def ids_worst_first(store: Items, label: object = lambda _, payload: payload["kind"]) -> list[ItemId]:
    return worst_first_ids(store, label, seed=0)  # type: ignore[arg-type]


def directions(n: int, seed: int = 0) -> np.ndarray:
    """Vectors of every length, for only their direction counts."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, DIM)) * rng.uniform(0.1, 10, (n, 1))).astype(np.float32)


def plainly(vectors: np.ndarray, labels: list[str]) -> list[float]:
    """1 - cosine to the mean direction of an item's class, or to the nearest, one item at a time."""
    units = [vector / np.linalg.norm(vector) for vector in vectors.astype(np.float64)]
    centroids = {}
    for label in set(labels) - {""}:
        total = sum(unit for unit, own in zip(units, labels, strict=True) if own == label)
        centroids[label] = total / np.linalg.norm(total)
    return [
        1 - (unit @ centroids[label] if label else max(unit @ centroid for centroid in centroids.values()))
        for unit, label in zip(units, labels, strict=True)
    ]


@settings(deadline=None)
@given(labels=labels_of.filter(any), seed=st.integers(0, 100))
def test_farthest_from_the_centre_of_its_class_comes_first(labels, seed):
    vectors = directions(len(labels), seed)
    expected = np.array(plainly(vectors, labels))
    rows = worst_first(vectors, labels, seed=0)
    assert sorted(rows) == list(range(len(labels)))
    assert (np.diff(expected[rows]) <= 1e-5).all()


@settings(deadline=None)
@given(labels=labels_of, size=st.integers(1, 9), seed=st.integers(0, 100), cells=st.integers(1, 20))
def test_a_collection_page_by_page_is_in_the_same_order(labels, size, seed, cells):
    vectors = directions(len(labels), seed)
    ids: list[ItemId] = [row if row % 2 else f"{row}" for row in range(len(labels))]
    store = Items(dict(zip(ids, zip(vectors, labels, strict=True), strict=True)))
    in_order = list(store.items)
    rows = [ids.index(item) for item in in_order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pages", partial(pages, size=size))
        patch.setattr(ordering, "CELLS", cells)
        found = ids_worst_first(store)
    assert sorted(map(repr, found)) == sorted(map(repr, ids)), "each item once, and 7 is not '7'"
    row_of = {repr(item): row for row, item in enumerate(in_order)}
    expected = worst_first(vectors[rows], [labels[row] for row in rows], seed=0)
    if any(labels):
        values = np.array(plainly(vectors[rows], [labels[row] for row in rows]))
        assert values[[row_of[repr(item)] for item in found]] == pytest.approx(values[expected], abs=1e-5)
    else:
        assert found == [in_order[row] for row in expected]


def test_what_search_cannot_find_comes_first_and_ties_keep_their_order():
    vectors = np.array(
        [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [NAN, 1, 0, 0], [1, 0, 0, 0], [INF, 0, 0, 0], [0, 2, 0, 0]],
        np.float32,
    )
    labels = ["a", "a", "a", "", "a", "b", "a"]
    rows = worst_first(vectors, labels, seed=0)
    assert list(rows) == [1, 3, 5, 0, 2, 4, 6], "the rest lie at 45 degrees from their centroid, all of them"
    unfindable = np.isinf(distance_to_centroid(vectors, np.zeros(7, np.int64), vectors[:1]))
    assert list(np.flatnonzero(unfindable)) == [1, 3, 5]


def test_an_item_without_a_label_is_as_far_as_the_nearest_class():
    vectors = np.eye(DIM, dtype=np.float32)[[0, 1, 0, 2]]
    assert distance_to_centroid(vectors, np.array([0, 1, -1, -1]), vectors[:2]) == pytest.approx([0, 0, 0, 1])
    assert list(worst_first(vectors, ["a", "b", "", ""], seed=0)) == [3, 0, 1, 2]


def test_a_class_without_a_direction_is_nobodys_nearest():
    centroids = np.array([[0, 0, 0, 0], [-1, 0, 0, 0]], np.float32)
    vectors = np.eye(DIM, dtype=np.float32)[[0, 0]]
    assert distance_to_centroid(vectors, np.array([-1, 0]), centroids) == pytest.approx([2, 1])
    assert distance_to_centroid(vectors, np.array([-1, 0]), centroids[:1]) == pytest.approx([1, 1])
    assert distance_to_centroid(vectors, np.array([-1, -1]), centroids[:0]) == pytest.approx([1, 1])


def test_a_large_class_is_summed_without_losing_its_later_items(monkeypatch):
    """Added up one by one in float32, 1 + 2**24 stays 2**24; half the items would not move the centroid."""
    classes = ordering.Classes()
    classes.add(np.eye(DIM, dtype=np.float32)[:1], ["a"])
    classes._sums[0] = [2**24, 0, 0, 0]
    classes.add(np.repeat(np.eye(DIM, dtype=np.float32)[:1], 1000, axis=0), ["a"] * 1000)
    assert classes._sums[0, 0] == 2**24 + 1000


def clusters(seed: int = 0) -> np.ndarray:
    """Forty vectors about each of two directions, and one that is far from both."""
    noise = np.random.default_rng(seed).standard_normal((81, DIM)) * 0.1
    centroids = np.eye(DIM)[[0] * 40 + [1] * 40 + [3]]
    return (centroids + noise).astype(np.float32)


def sample_of(vectors: int, patch: pytest.MonkeyPatch) -> None:
    for place in (module, ordering):
        patch.setattr(place, "SAMPLE", vectors)


@pytest.mark.parametrize("labels", [None, [""] * 81])
def test_without_labels_the_nearest_cluster_counts(labels, monkeypatch):
    monkeypatch.setattr(ordering, "default_k", lambda _: 2)
    sample_of(80, monkeypatch)  # without the one that is far off: it would be a cluster of its own
    vectors = clusters()
    store = Items({row: (vector, "") for row, vector in enumerate(vectors)})
    assert ids_worst_first(store, None if labels is None else lambda *_: "")[0] == 80
    sample_of(81, monkeypatch)
    rows = worst_first(vectors, labels, seed=0)
    assert list(rows) == list(worst_first(vectors, labels, seed=0))
    assert rows[0] == 80


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_collection_of_hardly_anything(count):
    vectors = directions(count)
    store = Items({row: (vector, "") for row, vector in enumerate(vectors)})
    assert sorted(ids_worst_first(store)) == sorted(ids_worst_first(store, None)) == list(range(count))
    assert sorted(worst_first(vectors.reshape(-1, DIM), None, seed=0)) == list(range(count))


def test_a_collection_without_a_usable_vector_keeps_its_order():
    store = Items(dict.fromkeys([3, 1, "1"], (np.zeros(DIM, np.float32), "a")))
    assert ids_worst_first(store) == ids_worst_first(store, None) == [1, 3, "1"]


def test_faiss_is_needed_only_where_there_are_no_labels(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = directions(20)
    assert len(worst_first(vectors, ["a"] * 20, seed=0)) == 20
    with pytest.raises(UsageProblem) as caught:
        worst_first(vectors, None, seed=0)
    assert "set verify.label" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_passes_and_no_more():
    store = Items({row: (vector, "a") for row, vector in enumerate(directions(30))})
    ids_worst_first(store)
    assert store.scans == 2


def test_importing_it_loads_no_heavy_library():
    code = (
        "import sys, migrator.backfill.order; "
        "sys.exit(bool({'torch', 'faiss', 'scipy', 'migrator.verify'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
