"""Cutting a collection into chunks, once: the boundaries are stored before the first chunk is worked on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from adapters.base import ItemId
from migrator.backfill.transfer import Transfer
from migrator.ledger import Ledger, Migration


def cut_first_pass(transfer: Transfer, ledger: Ledger, migration: Migration, *, size: int) -> int:
    """Cuts the whole collection into ranges of `size` items and stores them; returns the number of chunks.

    The boundaries are never derived again.
    """
    ranges = list(_ranges(transfer.everything(), size))
    ledger.add_chunks(migration.id, 0, ranges)
    return len(ranges)


def cut_catch_up(
    transfer: Transfer, ledger: Ledger, migration: Migration, *, size: int, leave: Collection[ItemId]
) -> int:
    """Cuts a further pass over the items that are outstanding, but for those in `leave`; returns their number."""
    # The number comes first: should another process store this pass meanwhile, ours is dropped and not a second one.
    number = ledger.counts(migration.id).passes
    ranges = list(_ranges(transfer.outstanding(leave), size))
    ledger.add_chunks(migration.id, number, ranges)
    return sum(items for _, _, items in ranges)


def _ranges(ids: Iterator[ItemId], size: int) -> Iterator[tuple[ItemId | None, ItemId, int]]:
    after: ItemId | None = None
    while block := list(itertools.islice(ids, size)):
        yield after, block[-1], len(block)
        after = block[-1]
