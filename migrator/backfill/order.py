"""The order of the backfill: the items whose stored vector serves search worst are re-embedded first.

Worst is what lies farthest from its own kind: 1 - cosine to the centroid of the item's class, or, where the collection
has no labels, to the nearest centroid of clusters that are found among its vectors. Nothing is embedded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, Payload, Store
from migrator.adapters.iterate import pages
from migrator.evaluation.ordering import SAMPLE, Classes, cluster_centroids, descending, distance_to_centroid

Label: TypeAlias = Callable[[ItemId, Payload], str]
"""The class of an item; empty where it has none."""


def worst_first_ids(store: Store, label: Label | None, *, seed: int) -> list[ItemId]:
    """All ids of a collection, worst vector first; ties in the order of ids.

    Two passes: the sums of the classes, then the distances. Memory: a float32 vector a class, and of each item its id,
    its distance and its place. Raises `UsageProblem` where there are no labels and no faiss.
    """
    classes = Classes()
    if label is not None:
        for page in pages(store):
            classes.add(page.vectors, _labels(label, page.ids, page.payloads))
    if classes.labelled:
        centroids = classes.centroids()
    else:
        sample = store.read_vectors(store.sample(SAMPLE, seed=seed)).vectors
        assert sample is not None
        centroids = cluster_centroids(sample, seed=seed)
    ids: list[ItemId] = []
    distances: list[NDArray[np.float32]] = []
    for page in pages(store):
        labels = [""] * len(page) if label is None else _labels(label, page.ids, page.payloads)
        ids += page.ids
        distances.append(distance_to_centroid(page.vectors, classes.codes(labels), centroids))
    return [ids[row] for row in descending(np.concatenate(distances))] if ids else []


def _labels(label: Label, ids: Sequence[ItemId], payloads: Sequence[Payload] | None) -> list[str]:
    assert payloads is not None
    return [label(item, payload) for item, payload in zip(ids, payloads, strict=True)]
