"""Going through a store: all ids, all items page by page; batches for one request each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from migrator.adapters.base import ItemId, Page, Payload, Store, StoreRejected, with_further

T = TypeVar("T")

IDS = 10_000
"""Ids per page: large, as only ids travel."""
ITEMS = 5_000
"""Items per page where vectors and payloads are compared."""


def iter_ids(store: Store, after: ItemId | None = None, up_to: ItemId | None = None) -> Iterator[ItemId]:
    """The ids in (after, up_to], in order."""
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
    return with_further(store, store.read(ids))


def payloads(store: Store, ids: Iterable[ItemId]) -> Iterator[tuple[ItemId, Payload]]:
    """Id and payload of these items, read page by page; ids that no longer exist are skipped."""
    remaining = iter(ids)
    while batch := list(itertools.islice(remaining, ITEMS)):
        page = store.read_payloads(batch)
        yield from zip(page.ids, page.payloads, strict=True)


def parts(ids: Sequence[T], size: int) -> Iterator[list[T]]:
    """The ids, cut into lists of at most `size`."""
    for start in range(0, len(ids), size):
        yield list(ids[start : start + size])


def write_halving(
    items: Sequence[T],
    write: Callable[[list[T]], None],
    id_of: Callable[[T], ItemId],
    refusal: type[StoreRejected] = StoreRejected,
    fatal: type[StoreRejected] | tuple[()] = (),
) -> dict[ItemId, str]:
    """Writes items; halves a batch that is refused, down to the item that is to blame. Reasons of those refused.

    A `fatal` refusal, for which no item is to blame, is raised.
    """
    if not items:
        return {}
    try:
        write(list(items))
    except fatal:
        raise
    except refusal as reason:
        if len(items) == 1:
            return {id_of(items[0]): str(reason)}
        half = len(items) // 2
        first = write_halving(items[:half], write, id_of, refusal, fatal)
        return {**first, **write_halving(items[half:], write, id_of, refusal, fatal)}
    return {}
