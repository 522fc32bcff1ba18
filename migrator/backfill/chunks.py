"""Cutting a collection into chunks, once, and finding what a chunk still has to do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator

from adapters.base import ItemId, Store, order_key
from migrator.ledger import Chunk, Ledger, Migration

PAGE = 10_000  # ids a page while cutting: large, as only ids travel


def cut_first_pass(store: Store, ledger: Ledger, migration: Migration, *, size: int) -> int:
    """Cuts the whole collection into ranges of `size` items and stores them; returns the number of chunks.

    The boundaries are stored before the first chunk is worked on and are never derived again.
    """

    def page(after: ItemId | None) -> list[ItemId]:
        return store.scan_ids(after=after, limit=PAGE)

    ranges = list(_ranges(_walk(page), size))
    ledger.add_chunks(migration.id, 0, ranges)
    return len(ranges)


def cut_catch_up(
    store: Store, ledger: Ledger, migration: Migration, *, stamp: str, size: int, leave: Collection[ItemId]
) -> int:
    """Cuts a further pass over the items that do not carry `stamp`, but for those in `leave`; returns their number."""

    def page(after: ItemId | None) -> list[ItemId]:
        return store.unstamped(stamp, after=after, limit=PAGE)

    # The number comes first: should another process store this pass meanwhile, ours is dropped and not a second one.
    number = ledger.counts(migration.id).passes
    ranges = list(_ranges((item for item in _walk(page) if item not in leave), size))
    ledger.add_chunks(migration.id, number, ranges)
    return sum(items for _, _, items in ranges)


def items_to_do(store: Store, chunk: Chunk, *, stamp: str, leave: Collection[ItemId]) -> list[ItemId]:
    """The items in the chunk's range that do not carry `stamp`, in order, but for those in `leave`."""
    upto = order_key(json.loads(chunk.upto_id))

    def page(after: ItemId | None) -> list[ItemId]:
        return store.unstamped(stamp, after=after, limit=chunk.items + 1)

    start = None if chunk.after_id is None else json.loads(chunk.after_id)
    inside = itertools.takewhile(lambda item: order_key(item) <= upto, _walk(page, start))
    return [item for item in inside if item not in leave]


def _walk(page: Callable[[ItemId | None], list[ItemId]], after: ItemId | None = None) -> Iterator[ItemId]:
    while ids := page(after):
        yield from ids
        after = ids[-1]


def _ranges(ids: Iterator[ItemId], size: int) -> Iterator[tuple[ItemId | None, ItemId, int]]:
    after: ItemId | None = None
    while block := list(itertools.islice(ids, size)):
        yield after, block[-1], len(block)
        after = block[-1]
