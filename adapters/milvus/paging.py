"""Conditions on the primary key of a Milvus collection, and its rows page by page in the order of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from migrator.adapters.base import ItemId, order_key
from migrator.adapters.milvus.connection import Row, TooLarge

SMALLEST, LARGEST = -(2**63), 2**63 - 1
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
"""In the server's language; it knows no more of them, and takes other characters as they are."""


class Query(Protocol):
    """Rows by a condition."""

    def __call__(self, condition: str, *, fields: list[str], limit: int, ordered: bool) -> list[Row]:
        """Up to `limit` rows; `ordered` by the primary key."""
        ...


class Keys:
    """The primary key of a collection: its field, and how the query language speaks of it."""

    def __init__(self, name: str, *, strings: bool) -> None:
        self.name, self.strings = name, strings

    def possible(self, item: ItemId) -> bool:
        """Whether a row can have this key: it is of the right type and size."""
        return isinstance(item, str) == self.strings and (isinstance(item, str) or SMALLEST <= item <= LARGEST)

    def literal(self, item: ItemId) -> str:
        """The key as the query language writes it."""
        if isinstance(item, int):
            return str(item)
        return '"' + "".join(ESCAPES.get(character, character) for character in item) + '"'

    def beyond(self, after: ItemId | None) -> str | None:
        """The condition for keys beyond `after`; None if there can be none."""
        if after is None:
            return "" if not self.strings else f'{self.name} >= ""'
        if isinstance(after, str) != self.strings:
            # All integers come before all strings.
            return None if isinstance(after, str) else f'{self.name} >= ""'
        if isinstance(after, int):
            if after >= LARGEST:
                return None
            # The language cannot say the smallest integer.
            return "" if after < SMALLEST else f"{self.name} >= {after + 1}"
        return f"{self.name} > {self.literal(after)}"

    def up_to(self, up_to: ItemId | None) -> str | None:
        """The condition for keys not beyond `up_to`; None if there can be none."""
        if up_to is None:
            return ""
        if isinstance(up_to, str) != self.strings:
            return "" if isinstance(up_to, str) else None
        if isinstance(up_to, int):
            if up_to < SMALLEST:
                return None
            return "" if up_to >= LARGEST else f"{self.name} < {up_to + 1}"
        return f"{self.name} <= {self.literal(up_to)}"

    def pages(
        self,
        query: Query,
        condition: str,
        after: ItemId | None,
        up_to: ItemId | None,
        limit: int,
        fields: list[str],
        size: int,
    ) -> Iterator[list[Row]]:
        """Up to `limit` rows in the order of the keys, in pages of `size`, as they are when the first is asked for."""
        inside = self.up_to(up_to)
        while limit > 0 and inside is not None and (beyond := self.beyond(after)) is not None:
            size = min(size, limit)
            both = " and ".join(f"({part})" for part in (beyond, inside, condition) if part)
            try:
                page = query(both, fields=fields, limit=size, ordered=True)
            except TooLarge:
                if size == 1:
                    raise
                size //= 2
                continue
            rows = {row[self.name]: row for row in page}  # a key may lie in two rows
            whole = len(page) == size
            page = sorted(rows.values(), key=lambda row: order_key(row[self.name]))
            if page:
                yield page
            if not whole:
                break
            limit -= len(page)
            after = page[-1][self.name]
