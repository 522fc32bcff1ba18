"""The one way to page through a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from migrator.adapters.base import ItemId, Page, Store, with_further

IDS = 10_000
"""Ids per page: large, as only ids travel."""
ITEMS = 5_000
"""Items per page where vectors and payloads are compared."""


def iter_ids(store: Store, after: ItemId | None = None, up_to: ItemId | None = None) -> Iterator[ItemId]:
    """The ids in (after, up_to], in order, page by page."""
    while ids := store.scan_ids(after=after, up_to=up_to, limit=IDS):
        yield from ids
        if len(ids) < IDS:
            return
        after = ids[-1]


def pages(store: Store, after: ItemId | None = None, up_to: ItemId | None = None, size: int = ITEMS) -> Iterator[Page]:
    """The items in (after, up_to], in order, with vectors and payloads; at least one page, which may be empty."""
    while True:
        page = store.scan(after=after, up_to=up_to, limit=size)
        yield page
        if len(page) < size:
            return
        after = page.ids[-1]


def whole_pages(
    store: Store, after: ItemId | None = None, up_to: ItemId | None = None, size: int = ITEMS
) -> Iterator[Page]:
    """As `pages`, with further vectors."""
    return (with_further(store, page) for page in pages(store, after, up_to, size))


def read_whole(store: Store, ids: Sequence[ItemId]) -> Page:
    """These items with everything: vectors, payloads, further vectors."""
    return with_further(store, store.read(ids, vectors=True, payload=True))
