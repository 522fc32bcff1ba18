"""Cutting a collection into chunks, once: they are stored before the first of them is worked on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from migrator.adapters.base import ItemId, order_key
from migrator.backfill.transfer import Transfer
from migrator.ledger import Ledger, Migration


def cut_first_pass(
    transfer: Transfer, ledger: Ledger, migration: Migration, *, size: int, order: Sequence[ItemId] | None = None
) -> int:
    """Cuts the whole collection into chunks of `size` items and stores them; returns the number of chunks.

    They are ranges in the order of ids, or, with another `order` of all ids, lists. Neither is ever derived again.
    """
    if order is None:
        ranges = list(_ranges(transfer.everything(), size))
        ledger.add_chunks(migration.id, 0, ranges)
        return len(ranges)
    lists = [order[start : start + size] for start in range(0, len(order), size)]
    # The range of a list covers it, for whoever needs only whether an item may be in it.
    last = max(order, key=order_key, default=0)
    ledger.add_chunks(migration.id, 0, [(None, last, len(ids)) for ids in lists], lists)
    return len(lists)


def cut_catch_up(
    transfer: Transfer, ledger: Ledger, migration: Migration, *, size: int, leave: Collection[ItemId]
) -> int:
    """Cuts a further pass over the items that are outstanding, but for those in `leave`; returns their number."""
    # The number comes first: if another process stores this pass meanwhile, this one is dropped and no second one
    # stored.
    number = ledger.counts(migration.id).passes
    ranges = list(_ranges(transfer.outstanding(leave), size))
    ledger.add_chunks(migration.id, number, ranges)
    return sum(items for _, _, items in ranges)


def _ranges(ids: Iterator[ItemId], size: int) -> Iterator[tuple[ItemId | None, ItemId, int]]:
    after: ItemId | None = None
    while block := list(itertools.islice(ids, size)):
        yield after, block[-1], len(block)
        after = block[-1]
