"""What a migration will be worth, before it begins: quality by share of the backfill, on a cheap sample, with dates.

The sample is small and its gallery is too, so its figures are easier to reach than the collection's. What it shows is
the way from today's search to the finished one. `verify` measures both on more.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import ItemId, Store, order_key
from migrator.embedding.embed import embed, locate
from migrator.embedding.stored_encoder import unit
from migrator.evaluation.bootstrap import Interval, bootstrap
from migrator.evaluation.exact_search import mixtures, rank
from migrator.evaluation.metrics import parse_metric, relevance, summarise, tag_relevance
from migrator.evaluation.ordering import worst_first
from migrator.evaluation.verdicts import MOMENTS, Test, amount
from migrator.labels import Tags, tags_or_refuse
from migrator.lifecycle.strategy import STRATEGIES
from migrator.project import Project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.config import Gate
    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.images.source import ImageSource

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ITEMS = 256
"""Items of the sample, every one of which is also a query for the others of its class."""
LOOKED_AT = 5_000
"""Items whose payloads are read to find classes with several items."""
SEED = 0
RESAMPLES = 2_000
"""At most: the forecast decides nothing."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The gate's metric on the sample."""

    metric: str
    today: float
    """Old queries, old gallery."""
    values: tuple[float, ...] | None
    """New queries against the gallery at each of `SHARES`; None where there is no new encoder to compare with."""
    sampled: int
    gains: tuple[Interval, ...] | None = None
    """Over today, of `values`; of a shadow the last alone."""


def expected_quality(
    project: Project,
    store: Store,
    images: ImageSource,
    new: Encoder | None,
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> Quality | None:
    """Measures on a sample of the collection; None where it has no classes with several items. Today's search is
    searched with the items' stored vectors, so that no old model is needed."""
    tags_at = _sample(project, store)
    if not tags_at:
        return None
    page = store.read(list(tags_at))
    paths = locate(images, zip(page.ids, page.payloads, strict=True))
    rows = np.arange(len(page.ids))
    by_new = None
    if new is not None:
        done = 0

        def step(more: int) -> None:
            nonlocal done
            done += more
            report(done, len(paths))

        found = embed(images, paths, [new], report=step, **project.loading())
        rows, by_new = found.rows, found.vectors[0]
    by_old = unit(page.vectors[rows])
    tags = [tags_at[page.ids[row]] for row in rows.tolist()]
    classes = [some[0] if len(some) == 1 else "" for some in tags]
    metric = project.settings.verify.gate.metric
    depth = parse_metric(metric).k
    own = np.arange(len(rows))
    several = any(len(some) > 1 for some in tags)

    def per_query(ranking: NDArray[np.int32]) -> NDArray[np.float64]:
        judged = tag_relevance(tags, tags, ranking, own) if several else relevance(classes, classes, ranking, own)
        return parse_metric(metric).per_query(judged)

    before = per_query(rank(by_old, by_old, depth, exclude=own))
    today = summarise(before).mean
    if np.isnan(today):
        return None
    if by_new is None:
        return Quality(metric, today, None, len(rows))
    second_collection = STRATEGIES[project.settings.rollout.strategy].second_collection
    if not second_collection and by_new.shape[1] == by_old.shape[1]:
        order = own
        if project.settings.backfill.order == "worst_first":
            order = worst_first(by_old, classes, seed=SEED)
        after = [per_query(ranking) for ranking in mixtures(by_new, by_old, by_new, order, SHARES, depth, exclude=own)]
        values = tuple(summarise(at).mean for at in after)
    else:  # a shadow: today's search until it is whole, then the new one
        after = [per_query(rank(by_new, by_new, depth, exclude=own))]
        values = (*[today] * (len(SHARES) - 1), summarise(after[0]).mean)
    gate = project.settings.verify.gate
    clusters = np.unique(classes, return_inverse=True)[1] if gate.cluster == "class" and not several else None
    drawn = bootstrap(
        np.stack(after, axis=1) - before[:, None], clusters,
        confidence=1 - (1 - gate.confidence) / len(after), resamples=min(gate.resamples, RESAMPLES), seed=SEED,
    )  # fmt: skip
    gains = tuple(drawn.interval(column) for column in range(len(after)))
    return Quality(metric, today, values, len(rows), gains)


def loss_risks(quality: Quality | None, gate: Gate) -> list[str]:
    """The forecast's losses, as risks: at the canary, at the lowest point, and after the backfill.

    A loss that the sample shows significantly and the gate allows is said to be accepted.
    """
    if quality is None or quality.gains is None:
        return []
    gains = quality.gains
    found: dict[Test, Interval] = {"self": gains[-1]}
    if len(gains) > 1:
        found = {"cross": gains[0], "lowest": min(gains, key=lambda gain: gain.mean), **found}
        if found["lowest"] in (gains[0], gains[-1]):
            del found["lowest"]  # an end, which is told
    risks = []
    for test, gain in found.items():
        if round(gain.mean, 4) >= 0:
            continue
        known = gain.to_json() is not None
        between = f" (between {gain.low:+.4f} and {gain.high:+.4f})" if known else ""
        begin = f"forecast {MOMENTS[test]}: {quality.metric} worse by {amount(gain.mean)}{between}"
        limit = gate.least_gain(test)
        if not known or gain.high >= 0:
            risks.append(
                f"{begin}; the sample of {quality.sampled} items is too small to be sure, verify measures more"
            )
        elif gain.low >= limit:
            risks.append(f"{begin}; accepted by your gate (min_gain {limit:g})")
        else:
            risks.append(f"{begin}; verify will probably not pass with min_gain {limit:g}")
    return risks


def _sample(project: Project, store: Store) -> dict[ItemId, Tags]:
    """Items of classes that have several, class by class until there are enough, in the total order of ids, each with
    its classes; empty without labels. Raises `ConfigError` where a label is a structure."""
    template = project.settings.verify.label
    if template is None:
        return {}
    page = store.read_payloads(store.sample(LOOKED_AT, seed=SEED))
    tags_at: dict[ItemId, Tags] = {}
    members: dict[str, list[ItemId]] = {}
    for item, payload in zip(page.ids, page.payloads, strict=True):
        tags_at[item] = tags_or_refuse(project, item, payload)
        for tag in tags_at[item]:
            members.setdefault(tag, []).append(item)
    several = [tag for tag, items in members.items() if len(items) > 1]
    if not several:
        return {}
    order = np.random.default_rng(SEED).permutation(len(several)).tolist()
    # Two or more of each of many classes tell more than many of a few.
    each = max(2, ITEMS // len(several))
    chosen: dict[ItemId, None] = {}
    for at in order:
        if len(chosen) >= ITEMS:
            break
        chosen |= dict.fromkeys(members[several[at]][:each])
    return {item: tags_at[item] for item in sorted(chosen, key=order_key)}  # as the backfill goes


def forecast(
    quality: Quality | None, *, metric: str, items: int, items_per_second: float, begin: dt.datetime
) -> dict[str, Any]:
    """Quality and date at each share of the backfill, if it began at `begin` and ran without rest. JSON-able."""
    known: Sequence[float | None] = [None] * len(SHARES)
    if quality is not None and quality.values is not None:
        known = quality.values
    gains: list[Interval | None] = [None] * len(SHARES)
    if quality is not None and quality.gains is not None:
        gains[-len(quality.gains) :] = quality.gains
    points = []
    for share, value, gain in zip(SHARES, known, gains, strict=True):
        at = None
        if items_per_second > 0:
            at = (begin + dt.timedelta(seconds=share * items / items_per_second)).isoformat(timespec="seconds")
        points.append(
            {
                "share": share,
                "value": None if value is None else round(value, 4),
                "gain": None if gain is None else gain.to_json(),
                "at": at,
            }
        )
    return {
        "metric": metric,
        "today": None if quality is None else round(quality.today, 4),
        "points": points,
        "sampled": 0 if quality is None else quality.sampled,
        "items_per_second": round(items_per_second, 1),
    }
