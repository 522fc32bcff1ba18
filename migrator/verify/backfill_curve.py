"""The backfill curve: what new queries find while the gallery is re-embedded, share by share, in an order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.config import FLIPS
from migrator.errors import UsageProblem
from migrator.evaluation.bootstrap import BootstrapConfig, Interval, bootstrap
from migrator.evaluation.exact_search import mixtures
from migrator.evaluation.metrics import Relevance, backfill_auc, negative_flips, parse_metric, summarise
from migrator.evaluation.ordering import worst_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from migrator.verify.judged_queries import JudgedQueries

SHARES = tuple(share / 10 for share in range(11))


@dataclass(frozen=True, slots=True)
class BackfillCurve:
    """New queries against the gallery at each of `SHARES` of the backfill."""

    order: str
    """The one that the backfill uses."""
    orders: dict[str, dict[str, NDArray[np.float64]]]
    """Order -> metric -> value of each query at each share, (shares, q)."""

    @property
    def chosen(self) -> dict[str, NDArray[np.float64]]:
        """Of the backfill's own order: what the test `lowest` is about."""
        return self.orders[self.order]


def measure_curve(
    judged_queries: JudgedQueries,
    today: Relevance,
    queries: NDArray[np.float32],
    gallery_old: NDArray[np.float32],
    gallery_new: NDArray[np.float32],
    *,
    order: str,
    metrics: Sequence[str],
    seed: int,
) -> BackfillCurve:
    """Searches the gallery at each share, in both orders.

    Queries are (q, dim) by the new encoder, galleries (g, dim). `metrics` are the gate's, the first of them measured in
    both orders, the others, `negative_flips` too, in the chosen one. `today` is today's search, for the flips.
    Without labels and faiss worst_first is not measured, and refused where it is chosen.
    """
    orders = {"id": np.arange(len(gallery_old))}  # the gallery lies in the store's order
    try:
        orders["worst_first"] = worst_first(gallery_old, judged_queries.gallery_labels, seed=seed)
    except UsageProblem:  # neither labels nor faiss are here: it is no choice
        if order == "worst_first":
            raise
    depth = max(parse_metric(metric).k for metric in metrics if metric != FLIPS)
    measured: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, rows in orders.items():
        mixed = mixtures(queries, gallery_old, gallery_new, rows, SHARES, depth, exclude=judged_queries.own)
        judged = [judged_queries.judge(ranking) for ranking in mixed]
        wanted = metrics if name == order else metrics[:1]
        measured[name] = {metric: np.stack([_values(metric, today, at) for at in judged]) for metric in wanted}
    return BackfillCurve(order, measured)


def _values(metric: str, today: Relevance, judged: Relevance) -> NDArray[np.float64]:
    return negative_flips(today, judged) if metric == FLIPS else parse_metric(metric).per_query(judged)


def curve_facts(
    curve: BackfillCurve,
    *,
    metric: str,
    gain: Interval | None,
    clusters: NDArray[np.int64] | None,
    config: BootstrapConfig,
) -> dict[str, Any]:
    """Means of `metric` at each of `SHARES`, in both orders, with the area under each; JSON-able.

    `lowest` is the point of the chosen order where search is worst: vectors of two encoders side by side can be worse
    than either alone. `gain` is what the gate found there, over today. `auc_gain` is the area that worst_first gains
    over id, per query, with its interval.
    """
    means = {name: [summarise(at).or_zero for at in of[metric]] for name, of in curve.orders.items()}
    areas = {name: np.asarray(np.trapezoid(of[metric], SHARES, axis=0)) for name, of in curve.orders.items()}
    auc_gain = None
    if "worst_first" in areas:
        drawn = bootstrap((areas["worst_first"] - areas["id"])[:, None], clusters, **config._asdict())
        auc_gain = drawn.interval(0).to_json()
    at = int(np.argmin(means[curve.order]))
    return {
        "metric": metric,
        "shares": list(SHARES),
        "order": curve.order,
        "orders": {name: {"values": of, "auc": backfill_auc(SHARES, of)} for name, of in means.items()},
        "auc_gain": auc_gain,
        "lowest": {
            "share": SHARES[at],
            "value": means[curve.order][at],
            "gain": None if gain is None else gain.to_json(),
        },
    }


def expected(curve: dict[str, Any], share: float) -> float:
    """The curve's value at a share of the backfill, in the order that the backfill uses."""
    values: Sequence[float] = curve["orders"][curve["order"]]["values"]
    return float(np.interp(share, curve["shares"], values))
