"""What gets worse: the classes and segments that lose most, and example queries of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.evaluation.bootstrap import BootstrapConfig, bootstrap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.verify.judged_queries import JudgedQueries

MAX_GROUPS = 10
"""Classes, and segments, that are listed."""
EXAMPLES = 4
RESULTS = 5
"""Answers of an example."""

RESAMPLES = 2_000
"""At most: these intervals are shown, and decide nothing."""

Values = Mapping[str, "NDArray[np.float64]"]


def worst_groups(
    names: Sequence[str], values: Values, *, config: BootstrapConfig, limit: int = MAX_GROUPS
) -> dict[str, Any]:
    """The groups of queries with the least gain, by `names` (q,); JSON-able.

    `values` holds `old`, `new` and `negative_flips`, (q,) each. A group's interval is over its own queries.
    """
    old, new = values["old"], values["new"]
    counted = ~np.isnan(old)
    known, codes = np.unique(np.asarray(names, dtype=object)[counted].astype(str), return_inverse=True)
    sizes = np.bincount(codes, minlength=len(known))

    def means(column: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(codes, column[counted], minlength=len(known)) / sizes

    before, after, lost = means(old), means(new), means(values["negative_flips"])
    worst = np.lexsort((after, (after - before).round(9)))[:limit]
    groups = []
    if len(worst):
        gains = (new - old)[counted]
        columns = np.stack([np.where(codes == at, gains, np.nan) for at in worst], axis=1)
        drawn = bootstrap(columns, None, **config._replace(resamples=min(config.resamples, RESAMPLES))._asdict())
        for column, at in enumerate(worst.tolist()):
            interval = drawn.interval(column)
            groups.append(
                {
                    "name": str(known[at]),
                    "queries": int(sizes[at]),
                    "old": float(before[at]),
                    "new": float(after[at]),
                    "gain": float(after[at] - before[at]),
                    "low": None if np.isnan(interval.low) else interval.low,
                    "high": None if np.isnan(interval.high) else interval.high,
                    "negative_flips": float(lost[at]),
                }
            )
    return {"count": len(known), "worst": groups}


def examples(
    judged_queries: JudgedQueries,
    rankings: Mapping[str, NDArray[np.int32]],
    values: Values,
    classes: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """For each of the worst classes (None: of all queries) the one that lost most, with the first results of today's
    search and of the new one; JSON-able. `rankings` holds `old` and `new`, (q, k) each."""
    old, new = values["old"], values["new"]
    losses = np.where(np.isnan(old), np.inf, new - old)
    labels = judged_queries.labels
    if labels is None or classes is None:
        chosen = np.lexsort((new, losses))[:EXAMPLES].tolist()
    else:
        chosen = []
        for group in classes["worst"][:EXAMPLES]:
            members = [row for row, label in enumerate(labels) if label == group["name"] and np.isfinite(losses[row])]
            chosen += sorted(members, key=lambda row: (losses[row], new[row]))[:1]
    judged = {which: judged_queries.judge(ranking[:, :RESULTS]).hits for which, ranking in rankings.items()}
    return [
        {
            "class": None if labels is None else labels[row],
            "query": {
                "path": judged_queries.query_set.paths[judged_queries.rows[row]],
                "label": None if labels is None else labels[row],
            },
            **{
                which: [
                    _result(judged_queries, int(item), bool(hit))
                    for item, hit in zip(rankings[which][row, :RESULTS], judged[which][row], strict=True)
                    if item >= 0
                ]
                for which in ("old", "new")
            },
            "old_value": float(old[row]),
            "new_value": float(new[row]),
        }
        for row in chosen
        if np.isfinite(losses[row])
    ]


def _result(judged_queries: JudgedQueries, item: int, relevant: bool) -> dict[str, Any]:
    at = int(judged_queries.gallery[item])
    query_set = judged_queries.query_set
    label = None if query_set.gallery_labels is None else query_set.gallery_labels[at]
    if query_set.gallery_tags is not None:
        label = ", ".join(query_set.gallery_tags[at])
    return {
        "id": query_set.gallery[at],
        "path": query_set.gallery_paths[at],
        "label": label,
        "relevant": relevant,
    }
