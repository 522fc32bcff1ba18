"""The same query set through the store's own search, against the whole collection as it answers now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from migrator.adapters.base import Hits, ItemId, Payload, Store
from migrator.adapters.iterate import iter_ids, payloads
from migrator.evaluation.metrics import Relevance, parse_metric, summarise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.verify.query_set.model import QuerySet

Described: TypeAlias = tuple[tuple[str, ...], str | None]
"""The classes of an item, and the path of its image, None for none."""
_NOTHING: Described = ((), None)
Describe: TypeAlias = Callable[[ItemId, Payload], Described]

BATCH = 100
"""Queries in one request."""
RECALL_AT = 10


@dataclass(frozen=True, slots=True)
class Live:
    """What the index answers, and how near that is to what an exact search would."""

    tests: dict[str, dict[str, float]]
    """Test -> metric -> mean."""
    index_recall: dict[str, float]
    """Test -> share of the exact first ten answers that the index gives among its first ten."""
    items: int

    def to_json(self) -> dict[str, Any]:
        """As `migrator verify --live --json` prints it."""
        return {"tests": self.tests, "index_recall": {"k": RECALL_AT, **self.index_recall}, "items": self.items}


def evaluate_live(
    store: Store,
    query_set: QuerySet,
    rows: NDArray[np.int64],
    vectors: Mapping[str, NDArray[np.float32]],
    *,
    metrics: tuple[str, ...],
    describe: Describe,
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> Live:
    """Searches the index with the queries at `rows` (q,), for each test with its query vectors (q, dim).

    Where answers are right by their class, every payload of the collection is read once, to know how many right ones
    there are. A query's own item is known by its path, wherever it lies. Raises what the store raises.
    """
    depth = max(parse_metric(metric).k for metric in metrics)
    total = len(vectors) * 2 * len(rows)
    done = 0

    def search(queries: NDArray[np.float32], k: int, *, exact: bool) -> list[list[ItemId]]:
        nonlocal done
        found: list[list[ItemId]] = []
        for start in range(0, len(queries), BATCH):
            hits: Hits = store.search(queries[start : start + BATCH], k, exact=exact)
            found += [list(ids) for ids in hits.ids]
            done += len(hits.ids)
            report(done, total)
        return found

    known: dict[ItemId, Described] = {}
    members: dict[str, list[ItemId]] = {}
    if query_set.relevant is None:
        known = {item: describe(item, payload) for item, payload in payloads(store, iter_ids(store))}
        for item, (tags, _) in known.items():
            for tag in tags:
                members.setdefault(tag, []).append(item)
    tests: dict[str, dict[str, float]] = {}
    recall: dict[str, float] = {}
    for test, queries in vectors.items():
        answers = search(queries, depth + 1, exact=False)  # one more: the query's own item is taken out
        exact = search(queries, RECALL_AT, exact=True)
        recall[test] = float(
            np.mean(
                [
                    len(set(near).intersection(found[:RECALL_AT])) / max(1, len(near))
                    for near, found in zip(exact, answers, strict=True)
                ]
            )
        )
        if query_set.relevant is not None:
            found = dict.fromkeys(item for some in answers for item in some)
            known |= {item: describe(item, payload) for item, payload in payloads(store, found)}
        judged = _judge(query_set, rows, answers, depth, members, known)
        tests[test] = {metric: summarise(parse_metric(metric).per_query(judged)).or_zero for metric in metrics}
    return Live(tests, recall, store.count())


def _judge(
    query_set: QuerySet,
    rows: NDArray[np.int64],
    answers: Sequence[Sequence[ItemId]],
    depth: int,
    members: Mapping[str, Sequence[ItemId]],
    known: Mapping[ItemId, Described],
) -> Relevance:
    """Which answers are right, as `metrics.Relevance`. `known` holds what was found, `members` the items of classes."""
    hits = np.zeros((len(rows), depth), np.bool_)
    total = np.zeros(len(rows), np.int64)
    grades = np.zeros((len(rows), depth))
    ideal = np.zeros((len(rows), depth))
    tags_at = {path: tags for tags, path in known.values()}
    for at, row in enumerate(rows.tolist()):
        # An altered view is to find its own item.
        own = None if query_set.kind == "instance" else query_set.paths[row]
        found = [item for item in answers[at] if own is None or known.get(item, _NOTHING)[1] != own][:depth]
        if query_set.relevant is not None:
            right = query_set.relevant[row]
            best = sorted(right.values(), reverse=True)[:depth]
            total[at] = len(right)
            gained = [right.get(item, 0.0) for item in found]
        else:
            assert query_set.labels is not None
            wanted = {query_set.labels[row]} if query_set.tags is None else set(query_set.tags[row])
            total[at] = _count(wanted, members) - (not wanted.isdisjoint(tags_at.get(own, ())))
            best = [1.0] * min(int(total[at]), depth)
            gained = [float(not wanted.isdisjoint(known.get(item, _NOTHING)[0])) for item in found]
        grades[at, : len(gained)] = gained
        ideal[at, : len(best)] = best
        hits[at] = grades[at] > 0
    return Relevance(hits, total, grades, ideal)


def _count(tags: set[str], members: Mapping[str, Sequence[ItemId]]) -> int:
    """Items that have at least one of the classes."""
    lists = [members.get(tag, ()) for tag in tags]
    return len(lists[0]) if len(lists) == 1 else len(set().union(*lists))
