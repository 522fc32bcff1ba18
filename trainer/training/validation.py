"""How good an encoder in training is, on the images held out: for watching and for choosing, not for releasing.

`migrator verify` decides on a release; this module works on arrays and has no intervals.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

METRIC_K = 100


def measure(
    new: tuple[NDArray[np.float32], NDArray[np.float32]],
    old: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    labels: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    reverse: bool = False,
) -> dict[str, float]:
    """mAP@100 of held-out queries in a gallery of training images.

    Args:
        new: Vectors of queries (q, D) and gallery (g, D) from the new encoder, of unit length.
        old: The same from the old encoder; None where there is none.
        labels: Of queries (q,) and gallery (g,), int64.
        reverse: Whether to measure `reverse` too.

    Returns:
        `self` has both sides new, `old` both sides old, `cross` new queries in the old gallery, `reverse` old queries
        in the new one. The last two are missing where vectors differ in length.
    """
    measured = {"self": mean_average_precision(*new, *labels)}
    if old is None:
        return measured
    if old[0].shape[1] == new[0].shape[1]:
        measured["cross"] = mean_average_precision(new[0], old[1], *labels)
        if reverse:
            measured["reverse"] = mean_average_precision(old[0], new[1], *labels)
    measured["old"] = mean_average_precision(*old, *labels)
    return measured


def score(measured: Mapping[str, float], upper_bound: float | None) -> float:
    """P_1 of a validation, by which the best epoch is chosen: 0.5 is par, and more is better.

    P_1 = harmonic mean of P_up = sigmoid((self - bound) / bound) and P_comp = sigmoid((cross - old) / (bound - old)).
    `bound` is the self-test of an independent encoder. Where it is not known, or not above `old`, the old encoder
    stands in for it: sigmoid((self - old) / old) and sigmoid((cross - old) / old).

    Args:
        measured: mAP@100 by name, as `measure` returns it.
        upper_bound: mAP@100 of an independent encoder's self-test, 0..1.

    Returns:
        P_1, 0..1; without an old encoder to compare with, the self-test.

    Source:
        AdvBCT, https://arxiv.org/abs/2305.02610, section 4.2.
    """
    if "cross" not in measured:
        return measured["self"]
    old = max(measured["old"], 1e-6)
    bound, span = old, old
    if upper_bound is not None and upper_bound > old:
        bound, span = upper_bound, upper_bound - old
    up = _sigmoid((measured["self"] - bound) / bound)
    comp = _sigmoid((measured["cross"] - measured["old"]) / span)
    return 2 * up * comp / (up + comp) if up + comp else 0.0


def _sigmoid(x: float) -> float:
    # math.exp overflows above 709, and a span may be tiny.
    return 1 / (1 + math.exp(-max(min(x, 50.0), -50.0)))


def mean_average_precision(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    k: int = METRIC_K,
) -> float:
    """mAP@k by inner product: the mean over queries of sum_i precision@i relevant_i / min(k, number of relevant items).

    Args:
        queries: (q, D) float32.
        gallery: (g, D) float32.
        query_labels: (q,) int64.
        gallery_labels: (g,) int64; an item is relevant to the queries of the same label.
        k: Length of a result list.

    Returns:
        The mean over the queries that have a relevant item, 0..1; 0 where none has.
    """
    relevant_items = np.bincount(gallery_labels, minlength=int(query_labels.max()) + 1)[query_labels]
    k = min(k, len(gallery))
    precisions = []
    for start in range(0, len(queries), 256):
        part = slice(start, start + 256)
        order = _best(queries[part] @ gallery.T, k)
        relevant = gallery_labels[order] == query_labels[part, None]
        precision = relevant.cumsum(axis=1) / np.arange(1, k + 1)
        precisions.append((precision * relevant).sum(axis=1) / np.clip(relevant_items[part], 1, k))
    answerable = relevant_items > 0
    return float(np.concatenate(precisions)[answerable].mean()) if answerable.any() else 0.0


def _best(similarity: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Columns of the k greatest of each row, greatest first."""
    if k < similarity.shape[1]:
        columns = np.sort(np.argpartition(-similarity, k - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(-np.take_along_axis(similarity, columns, axis=1), axis=1, kind="stable")
        best: NDArray[np.int64] = np.take_along_axis(columns, order, axis=1)
        return best
    whole: NDArray[np.int64] = np.argsort(-similarity, axis=1, kind="stable")
    return whole
