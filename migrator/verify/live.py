"""The same questions through the store's own search, against the whole collection as it answers now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.base import Hits, ItemId, Payload, Store
from migrator.verify.metrics import Relevance, parse_metric, summarise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.verify.questions import Questions

PAGE = 10_000
"""Items whose payloads are read at once."""
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

    def as_json(self) -> dict[str, Any]:
        """As `migrator verify --live --json` prints it."""
        return {"tests": self.tests, "index_recall": {"k": RECALL_AT, **self.index_recall}, "items": self.items}


def ask_live(
    store: Store,
    questions: Questions,
    rows: NDArray[np.int64],
    vectors: Mapping[str, NDArray[np.float32]],
    *,
    metrics: tuple[str, ...],
    label: Callable[[ItemId, Payload], str],
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> Live:
    """Asks the questions at `rows` (q,) of the index, for each test with its query vectors (q, dim).

    `label` gives an item's class. Where answers are right by their class, every payload of the collection is read
    once, to know how many right ones there are. Raises what the store raises.
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

    sizes = _class_sizes(store, label) if questions.relevant is None else Counter()
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
        judged = _judge(store, questions, rows, answers, depth, sizes, label)
        tests[test] = {}
        for metric in metrics:
            mean = summarise(parse_metric(metric).per_query(judged)).mean
            tests[test][metric] = 0.0 if np.isnan(mean) else mean
    return Live(tests, recall, store.count())


def _class_sizes(store: Store, label: Callable[[ItemId, Payload], str]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    after: ItemId | None = None
    while ids := store.scan_ids(after=after, limit=PAGE):
        page = store.read(ids, vectors=False, payload=True)
        assert page.payloads is not None
        sizes.update(label(item, payload) for item, payload in zip(page.ids, page.payloads, strict=True))
        after = ids[-1]
    return sizes


def _judge(
    store: Store,
    questions: Questions,
    rows: NDArray[np.int64],
    answers: list[list[ItemId]],
    depth: int,
    sizes: Counter[str],
    label: Callable[[ItemId, Payload], str],
) -> Relevance:
    """Which answers are right, as `metrics.Relevance`."""
    hits = np.zeros((len(rows), depth), np.bool_)
    total = np.zeros(len(rows), np.int64)
    grades = np.zeros((len(rows), depth))
    ideal = np.zeros((len(rows), depth))
    labels: dict[ItemId, str] = {}
    if questions.relevant is None:
        asked = list(dict.fromkeys(item for found in answers for item in found))
        for start in range(0, len(asked), PAGE):
            page = store.read(asked[start : start + PAGE], vectors=False, payload=True)
            assert page.payloads is not None
            labels.update({item: label(item, load) for item, load in zip(page.ids, page.payloads, strict=True)})
    for at, row in enumerate(rows.tolist()):
        own = questions.own[row]
        found = [item for item in answers[at] if own is None or item != own][:depth]
        if questions.relevant is not None:
            right = questions.relevant[row]
            best = sorted(right.values(), reverse=True)[:depth]
            total[at] = len(right)
            gained = [right.get(item, 0.0) for item in found]
        else:
            assert questions.labels is not None
            name = questions.labels[row]
            total[at] = sizes[name] - (own is not None)
            best = [1.0] * min(int(total[at]), depth)
            gained = [float(labels.get(item) == name) for item in found]
        grades[at, : len(gained)] = gained
        ideal[at, : len(best)] = best
        hits[at] = grades[at] > 0
    return Relevance(hits, total, grades, ideal)
