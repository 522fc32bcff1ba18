"""The backfill curve: what new queries find while the gallery is re-embedded, share by share, in an order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.backfill.order import worst_first
from migrator.errors import UsageProblem
from migrator.verify.metrics import backfill_auc, parse_metric, summarise
from migrator.verify.ranking import mixtures
from migrator.verify.statistics import Sure, bootstrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from migrator.verify.asked import Asked

SHARES = tuple(share / 10 for share in range(11))


def backfill_curve(
    asked: Asked,
    today: NDArray[np.float64],
    queries: NDArray[np.float32],
    gallery_old: NDArray[np.float32],
    gallery_new: NDArray[np.float32],
    *,
    order: str,
    clusters: NDArray[np.int64] | None,
    metric: str,
    sure: Sure,
) -> dict[str, Any]:
    """Means of `metric` at each of `SHARES`, in both orders, with the area under each; JSON-able.

    `today` (q,) is what each query is worth in today's search. `lowest` is the point of the chosen order where search
    is worst, with its gain over today: vectors of two encoders side by side can be worse than either alone. `worth` is
    the area that worst_first gains over id, per query, with its interval; without labels and faiss that order is left
    out.
    """
    measure = parse_metric(metric)
    orders = {"id": np.arange(len(gallery_old))}  # the gallery lies in the store's order
    try:
        orders["worst_first"] = worst_first(gallery_old, asked.gallery_labels, seed=sure.seed)
    except UsageProblem:  # neither labels nor faiss are here: it is no choice
        if order == "worst_first":
            raise
    curves: dict[str, Any] = {}
    areas = {}
    lowest: dict[str, Any] = {}
    for name, rows in orders.items():
        mixed = mixtures(queries, gallery_old, gallery_new, rows, SHARES, measure.k, exclude=asked.own)
        values = np.stack([measure.per_query(asked.judge(ranking)) for ranking in mixed])  # (shares, q)
        means = [summarise(at).or_zero for at in values]
        curves[name] = {"values": means, "auc": backfill_auc(SHARES, means)}
        if name == order:
            at = int(np.argmin(means))
            gain = bootstrap((values[at] - today)[:, None], clusters, **sure._asdict()).interval(0)
            lowest = {"share": SHARES[at], "value": means[at], "gain": gain.as_json()}
        areas[name] = np.asarray(np.trapezoid(values, SHARES, axis=0))
    worth = None
    if "worst_first" in areas:
        drawn = bootstrap((areas["worst_first"] - areas["id"])[:, None], clusters, **sure._asdict())
        worth = drawn.interval(0).as_json()
    return {
        "metric": metric,
        "shares": list(SHARES),
        "order": order,
        "orders": curves,
        "worth": worth,
        "lowest": lowest,
    }


def expected(curve: dict[str, Any], share: float) -> float:
    """The curve's value at a share of the backfill, in the order that the backfill uses."""
    values: Sequence[float] = curve["orders"][curve["order"]]["values"]
    return float(np.interp(share, curve["shares"], values))
