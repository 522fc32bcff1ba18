"""The part of a query set whose images have vectors, in rows that fit each other, with what is relevant to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.evaluation.metrics import Relevance, graded_relevance, relevance, tag_relevance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.verify.query_set.model import QuerySet


@dataclass(frozen=True, slots=True)
class JudgedQueries:
    """q queries against g items: a part of the query set, for images may be unreadable and items may have gone."""

    query_set: QuerySet
    rows: NDArray[np.int64]  # (q,) positions in the query set
    gallery: NDArray[np.int64]  # (g,) positions in query_set.gallery
    own: NDArray[np.int64]  # (q,) row of the query's own item among the g, or -1
    relevant: list[dict[int, float]] | None
    """Row among the g -> grade, for each query; None of kind `labels`."""
    query_codes: NDArray[np.int64] | None
    """(q,) class, from 0 on; None unless each query has one."""
    gallery_codes: NDArray[np.int64] | None
    """(g,) class, or -1 for an item without one."""

    @classmethod
    def of(cls, query_set: QuerySet, rows: NDArray[np.integer], gallery: NDArray[np.integer]) -> JudgedQueries:
        """The queries at `rows` (q,), against the items at `gallery` (g,), positions in ascending order."""
        row_of = {item: row for row, item in enumerate(at_rows(query_set.gallery, gallery))}
        own = [-1 if item is None else row_of.get(item, -1) for item in at_rows(query_set.own, rows)]
        relevant = query_codes = gallery_codes = None
        if query_set.relevant is not None:
            relevant = [
                {row_of[item]: grade for item, grade in grades.items() if item in row_of}
                for grades in at_rows(query_set.relevant, rows)
            ]
        elif query_set.tags is None:
            assert query_set.labels is not None
            assert query_set.gallery_labels is not None
            codes = {label: code for code, label in enumerate(dict.fromkeys(query_set.labels))}
            query_codes = np.array([codes[label] for label in at_rows(query_set.labels, rows)], np.int64)
            for label in query_set.gallery_labels:
                codes.setdefault(label, len(codes))
            codes[""] = -1  # of items that have no class
            gallery_codes = np.array([codes[label] for label in at_rows(query_set.gallery_labels, gallery)], np.int64)
        return cls(
            query_set,
            rows.astype(np.int64),
            gallery.astype(np.int64),
            np.array(own, np.int64),
            relevant,
            query_codes,
            gallery_codes,
        )

    def judge(self, ranking: NDArray[np.integer]) -> Relevance:
        """Which results of `ranking` (q, k), rows among the g, are relevant."""
        if self.relevant is not None:
            return graded_relevance(self.relevant, ranking)
        if self.tags is not None:
            return tag_relevance(*self.tags, ranking, exclude=self.own)
        assert self.query_codes is not None
        assert self.gallery_codes is not None
        return relevance(self.query_codes, self.gallery_codes, ranking, exclude=self.own)

    @property
    def tags(self) -> tuple[list[list[str]], list[list[str]]] | None:
        """The classes of each query and of each item, where one may have several."""
        query_set = self.query_set
        if query_set.tags is None or query_set.gallery_tags is None:
            return None
        return at_rows(query_set.tags, self.rows), at_rows(query_set.gallery_tags, self.gallery)

    @property
    def labels(self) -> list[str] | None:
        """The class of each query, where there are classes."""
        return None if self.query_set.labels is None else at_rows(self.query_set.labels, self.rows)

    @property
    def gallery_labels(self) -> list[str] | None:
        """The class of each item, where there are classes."""
        return None if self.query_set.gallery_labels is None else at_rows(self.query_set.gallery_labels, self.gallery)

    @property
    def segments(self) -> list[str] | None:
        """The segment of each query, where there are segments."""
        return None if self.query_set.segments is None else at_rows(self.query_set.segments, self.rows)

    def clusters(self) -> NDArray[np.int64] | None:
        """A number for each query's class, (q,), where queries share classes; they are not independent then."""
        labels = self.labels
        if labels is None or len(set(labels)) == len(labels):
            return None
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def at_rows(values: Sequence[Any], rows: NDArray[np.integer]) -> list[Any]:
    """Those of `values` at `rows` (n,)."""
    return [values[row] for row in rows.tolist()]
