"""How far stored vectors lie from the centroid of their class: the order `worst_first` of the backfill.

The distance is 1 - cosine to the centroid of the item's class, or, where there are no labels, to the nearest centroid
of clusters that are found among the vectors. Nothing is embedded for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import Vectors
from migrator.embedding.stored_encoder import unit
from migrator.errors import UsageProblem
from migrator.trainer.data.pseudo import default_k, pseudo_classes
from migrator.trainer.errors import TrainingProblem

SAMPLE = 20_000
"""Vectors among which clusters are found."""
CELLS = 1 << 24
"""Similarities that are held at once."""


def worst_first(vectors: Vectors, labels: Sequence[str] | None, *, seed: int) -> NDArray[np.int64]:
    """The rows of `vectors` (n, d), worst first, (n,) int64; ties in the order of rows. An empty label is none.

    What `worst_first_ids` does to a collection. Raises `UsageProblem` where there are no labels and no faiss.
    """
    labels = [""] * len(vectors) if labels is None else labels
    classes = Classes()
    classes.add(vectors, labels)
    if classes.labelled:
        centroids = classes.centroids()
    else:
        drawn = np.random.default_rng(seed).permutation(len(vectors))[:SAMPLE]
        centroids = cluster_centroids(vectors[np.sort(drawn)], seed=seed)
    return descending(distance_to_centroid(vectors, classes.codes(labels), centroids))


def distance_to_centroid(vectors: Vectors, codes: NDArray[np.int64], centroids: Vectors) -> NDArray[np.float32]:
    """How far each vector (n, d) lies from the centroid of its class: 1 - cosine, (n,).

    `codes` (n,) are rows of `centroids` (k, d), of unit length, or zero where a class has no direction; for -1
    the nearest centroid counts. A vector that is zero or not finite is infinitely bad: search never finds it.
    """
    units, codes = unit(vectors), codes.copy()
    usable = units.any(axis=1)
    directed = np.flatnonzero(centroids.any(axis=1))
    if not len(directed):
        return np.where(usable, 1, np.inf).astype(np.float32)
    unknown, candidates = np.flatnonzero(usable & (codes < 0)), centroids[directed].T
    step = max(1, CELLS // len(directed))
    for start in range(0, len(unknown), step):
        rows = unknown[start : start + step]
        codes[rows] = directed[np.argmax(units[rows] @ candidates, axis=1)]
    # Row by row, not by the product above, whose last bits depend on a row's place: equal vectors are to tie.
    cosines = np.einsum("nd,nd->n", units, centroids[codes])
    return np.where(usable, 1 - cosines, np.inf).astype(np.float32)


class Classes:
    """Labels, numbered as they come, and the sums of their unit vectors."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._sums: Vectors = np.zeros((0, 0), np.float32)

    @property
    def labelled(self) -> bool:
        """Whether any item had a label."""
        return bool(self._numbers)

    def add(self, vectors: Vectors, labels: Sequence[str]) -> None:
        """Adds up vectors (n, d); those without a label count for no class."""
        for label in labels:
            if label:
                self._numbers.setdefault(label, len(self._numbers))
        codes = self.codes(labels)
        rows = np.argsort(codes, kind="stable")
        rows = rows[codes[rows] >= 0]
        if len(rows):
            present, starts = np.unique(codes[rows], return_index=True)
            self._make_room(vectors.shape[1])
            # A page's sum first: added one by one, the vectors of a large class would no longer change its float32 sum.
            self._sums[present] += np.add.reduceat(unit(vectors)[rows], starts, axis=0)

    def _make_room(self, dim: int) -> None:
        if len(self._numbers) > len(self._sums):
            larger = np.zeros((max(len(self._numbers), 2 * len(self._sums)), dim), np.float32)
            larger[: len(self._sums)] = self._sums.reshape(-1, dim)
            self._sums = larger

    def codes(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """The number of each label, (n,); -1 where it is empty or has not been added."""
        return np.array([self._numbers.get(label, -1) for label in labels], np.int64)

    def centroids(self) -> Vectors:
        """The direction of each class, (k, d) of unit length; zero where it has none."""
        return unit(self._sums[: len(self._numbers)])


def cluster_centroids(vectors: Vectors, *, seed: int) -> Vectors:
    """Centres of clusters among the vectors (n, d): (k, d) of unit length."""
    units = unit(vectors)
    units = units[units.any(axis=1)]
    if len(units) < 2:
        return units
    try:
        codes = pseudo_classes(units, default_k(len(units)), seed=seed)
    except TrainingProblem as problem:  # the number of classes suits, so faiss is missing
        raise UsageProblem(
            "backfill.order worst_first needs faiss where items have no labels: `pip install advbct-migrator[faiss]`, "
            "or set verify.label"
        ) from problem
    clusters = Classes()
    clusters.add(units, [str(code) for code in codes])
    return clusters.centroids()


def descending(distances: NDArray[np.float32]) -> NDArray[np.int64]:
    """The rows by distance, largest first; ties in the order of rows."""
    return np.argsort(-distances, kind="stable")
