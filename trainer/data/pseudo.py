"""Classes where there are no labels: clusters of the old vectors stand in for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from migrator.trainer.errors import TrainingProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray

ITERATIONS = 25
MAX_PER_CENTRE = 64
"""Images by which a centre is placed, on average at most. faiss asks for 39 at least, and its own limit of 256 would
make k-means take four times as long where there are a million images."""
MIN_PER_CLASS = 8
"""Images that a class of `default_k` has on average at least: fewer give no centre to speak of."""


def default_k(n: int) -> int:
    """How many classes suit n images: 4 sqrt(n), as inverted files are cut, but at least 8 images for each."""
    return max(2, min(round(4 * math.sqrt(n)), n // MIN_PER_CLASS))


def pseudo_classes(vectors: NDArray[np.float32], k: int, *, seed: int) -> NDArray[np.int64]:
    """Clusters the unit vectors (n, D) into at most k classes by spherical k-means (faiss): (n,) int64 from 0 on.

    The same for the same seed and number of threads. Clusters that end up empty are dropped, so that the classes are
    numbered without gaps. Raises TrainingProblem where k does not suit n, or faiss is not installed.
    """
    if not 2 <= k <= len(vectors):
        advice = "add images"
        if len(vectors) > 1:
            advice = f"set train.pseudo_classes to a number from 2 to {len(vectors)}, better {default_k(len(vectors))}"
        raise TrainingProblem(f"{len(vectors)} images cannot be made into {k} pseudo-classes: {advice}")
    try:
        import faiss
    except ImportError as error:
        raise TrainingProblem(
            "pseudo-classes need faiss: `pip install advbct-migrator[faiss]`, or give labels"
        ) from error
    data = np.ascontiguousarray(vectors, np.float32)
    # Without min_points_per_centroid faiss prints a warning for small sets, which it clusters well enough.
    clustering = faiss.Kmeans(
        data.shape[1],
        k,
        niter=ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MAX_PER_CENTRE,
    )
    clustering.train(data)
    _, nearest = clustering.index.search(data, 1)
    _, classes = np.unique(nearest[:, 0], return_inverse=True)
    found: NDArray[np.int64] = classes.astype(np.int64)
    return found
