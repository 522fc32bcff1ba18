"""Queries and gallery items while a query set is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from migrator.adapters.base import ItemId, Payload, Store
from migrator.labels import Tags

if TYPE_CHECKING:
    pass

T = TypeVar("T")
PAGE = 5_000
"""Items whose payloads are read at once."""


def have_several(tags: Iterable[Tags]) -> bool:
    """Whether any row has several classes."""
    return any(len(some) > 1 for some in tags)


@dataclass(frozen=True, slots=True)
class Gallery:
    """The items that are searched, in the total order of ids."""

    ids: list[ItemId]
    paths: list[str | None]
    tags: list[Tags] | None
    segments: list[str] | None

    @property
    def labels(self) -> list[str] | None:
        """The one class of each item, empty for none; None where classes are not known or an item has several."""
        return None if self.tags is None or have_several(self.tags) else [tags[0] if tags else "" for tags in self.tags]


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries, or what may become some; `numbers` are their rows in the file or the gallery."""

    paths: list[str]
    tags: list[Tags] | None
    segments: list[str] | None
    own: list[ItemId | None]
    relevant: list[dict[ItemId, float]] | None
    numbers: list[int]

    @property
    def labels(self) -> list[str] | None:
        """The class that each query is drawn and counted for: of several the one that fewest queries have."""
        if self.tags is None:
            return None
        sizes = Counter(tag for tags in self.tags for tag in tags)
        return [min(tags, key=lambda tag: (sizes[tag], tag)) for tags in self.tags]

    def at(self, rows: Iterable[int]) -> Queries:
        """Those at `rows`."""
        chosen = list(rows)

        def of(column: list[T] | None) -> list[T] | None:
            return None if column is None else [column[row] for row in chosen]

        return Queries(
            [self.paths[row] for row in chosen],
            of(self.tags),
            of(self.segments),
            [self.own[row] for row in chosen],
            of(self.relevant),
            [self.numbers[row] for row in chosen],
        )


def pages(store: Store, ids: Sequence[ItemId], *, payload: bool) -> Iterator[list[tuple[ItemId, Payload]]]:
    """Id and payload of these items, page by page; the payload is empty unless `payload`."""
    for start in range(0, len(ids), PAGE):
        some = ids[start : start + PAGE]
        if payload:
            page = store.read_payloads(some)
            yield list(zip(page.ids, page.payloads, strict=True))
        else:
            yield [(item, {}) for item in store.read_stamps(some).ids]
