"""What the old encoder's space looks like: a centre and a radius for each class, from old vectors and labels.

Source: AdvBCT, https://arxiv.org/abs/2305.02610, section 3.4.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from migrator.trainer.errors import TrainingProblem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MIN_FOR_OUTLIERS = 4
"""In smaller classes quartiles are meaningless, and no distance is dropped as an outlier."""
CHUNK = 65_536
"""Rows that are processed together."""


@dataclass(frozen=True)
class OldSpace:
    """The ball of each of C classes in the old space of D dimensions."""

    centres: NDArray[np.float32]  # (C, D), mean of unit vectors, not of unit length itself
    radii: NDArray[np.float32]  # (C,), distance on the unit sphere, 0..2
    known: NDArray[np.bool_]  # (C,), False: no ball, for want of old vectors; centre and radius are 0
    classifier: NDArray[np.float32] | None = None
    """(C, D) directions by which the old encoder's classifier knew the classes; NaN where it knows none."""


@dataclass(frozen=True)
class StoredVectors:
    """The old side where the old encoder is lost: the vectors that the collection holds, a row for each image."""

    id: str
    vectors: NDArray[np.float32]  # (n, D), unit length

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])


def stored_vectors(vectors: NDArray[np.float32]) -> StoredVectors:
    """Vectors (n, D) from a collection, brought to unit length; the id is a hash of them.

    Raises TrainingProblem for a vector that is zero or not finite.
    """
    lengths = _lengths(vectors)
    unit = (vectors / lengths[:, None]).astype(np.float32)
    digest = hashlib.sha256(np.ascontiguousarray(unit).data).hexdigest()
    return StoredVectors(f"stored-{digest[:16]}", unit)


def _chunks(n: int) -> Iterator[slice]:
    """Rows 0..n-1 in pieces: float64 copies of a million vectors would take gigabytes."""
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def _unit(vectors: NDArray[np.float32], lengths: NDArray[np.float32], rows: slice) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vectors[rows] / lengths[rows, None].astype(np.float64)
    return unit


def _lengths(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.empty(len(vectors), np.float32)
    for rows in _chunks(len(vectors)):
        lengths[rows] = np.linalg.norm(vectors[rows], axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise TrainingProblem(
            f"{len(bad)} of {len(vectors)} old vectors are zero or not finite (first: row {bad[0]}): "
            "check the old encoder's weights, or leave out the images whose stored vectors these are"
        )
    return lengths


def measure_old_space(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], *, classes: int, quantile: float, shrink: bool = True
) -> OldSpace:
    """Centres and radii of the classes in the old space.

    A centre is the mean of the L2-normalised vectors. A radius is the `quantile` (0..1, 1 for the largest) of the
    distances to the centre, after distances beyond [Q1 - 1.5 IQR, Q3 + 1.5 IQR] are dropped in classes of at least
    four images.

    The distances of fewer than four images are a poor estimate: with `shrink` such a radius is drawn towards the median
    radius of the classes that have four, with weight 1 for one image and 1/3 for three (n images have n - 1 free
    distances of the 3 that are required). Without it a class of one image is not `known`, as published.

    Args:
        vectors: (n, D) old vectors of any length.
        labels: (n,) int64 in 0..classes-1.
        classes: C, number of classes.
        quantile: Which of a class's distances is its radius, 0..1.
        shrink: Whether to correct the radii of small classes.

    Raises:
        TrainingProblem: A vector is zero or not finite.

    Source:
        AdvBCT, https://arxiv.org/abs/2305.02610, section 3.4.
    """
    lengths = _lengths(vectors)
    counts = np.bincount(labels, minlength=classes)
    centres = np.zeros((classes, vectors.shape[1]))
    for rows in _chunks(len(vectors)):
        order = np.argsort(labels[rows], kind="stable")
        there, starts = np.unique(labels[rows][order], return_index=True)
        centres[there] += np.add.reduceat(_unit(vectors, lengths, rows)[order], starts)
    centres /= np.maximum(counts, 1)[:, None]
    distances = np.empty(len(vectors))
    for rows in _chunks(len(vectors)):
        distances[rows] = np.linalg.norm(_unit(vectors, lengths, rows) - centres[labels[rows]], axis=1)

    first, third = (_class_quantiles(distances, labels, classes, q) for q in (0.25, 0.75))
    margin = 1.5 * (third - first)
    # A hair of tolerance: in a class whose distances are all equal, rounding must not make an outlier.
    inside = (distances >= (first - margin)[labels] - 1e-9) & (distances <= (third + margin)[labels] + 1e-9)
    kept = inside | (counts < MIN_FOR_OUTLIERS)[labels]
    radii = _class_quantiles(distances[kept], labels[kept], classes, quantile)

    known = counts >= 2
    enough = counts >= MIN_FOR_OUTLIERS
    usual = radii[enough] if enough.any() else radii[known]
    if shrink and len(usual):
        share = ((counts - 1) / (MIN_FOR_OUTLIERS - 1)).clip(0, 1)
        radii = share * radii + (1 - share) * np.median(usual)
        known = counts >= 1
    return OldSpace(
        np.where(known[:, None], centres, 0).astype(np.float32), np.where(known, radii, 0).astype(np.float32), known
    )


def _class_quantiles(
    values: NDArray[np.float64], labels: NDArray[np.int64], classes: int, quantile: float
) -> NDArray[np.float64]:
    """The quantile of each class's values, linearly interpolated as in numpy; 0 for a class without any. (C,)."""
    counts = np.bincount(labels, minlength=classes)
    ordered = values[np.lexsort((values, labels))]
    if not len(ordered):
        return np.zeros(classes)
    starts = np.cumsum(counts) - counts
    position = starts + quantile * np.maximum(counts - 1, 0)
    low = np.minimum(np.floor(position).astype(np.int64), len(ordered) - 1)
    high = np.minimum(low + 1, np.maximum(starts + counts - 1, 0))
    share = position - low
    result = ordered[low] + share * (ordered[np.maximum(high, low)] - ordered[low])
    return np.where(counts > 0, result, 0.0)
