"""What is known of a collection of Milvus Lite without asking it again.

A page in order costs as much as the whole collection there, so that going through all of it page by page costs the
square; and the checks before and after a write cost as much as the write. But one process at a time has the file, the
engine runs in that very process, and it counts every row that anybody writes or deletes. While that counter stands
where this store's own writes left it, what was read is what is there.
"""

from __future__ import annotations

import bisect
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from migrator.adapters.base import ItemId, order_key
from migrator.adapters.vectors import Contents

REMEMBERED_BYTES = 1 << 27
"""Of vectors and payloads read last, for the comparison right before a write."""


class Known:
    """Keys, stamps and the rows read last. Of a server, where anybody may write, nothing is ever known."""

    def __init__(self, collection: Callable[[], Any] | None, row_bytes: int) -> None:
        self._collection = collection
        self._lock = threading.RLock()
        self._at: tuple[Any, int] | None = None
        self._most = max(1, REMEMBERED_BYTES // row_bytes)
        self.forget()

    def forget(self) -> None:
        """Nothing is known any more."""
        self.keys: list[ItemId] | None = None
        """All of them, in order; None if they are yet to be read."""
        self.stamps: dict[ItemId, str | None] = {}
        """Of rows that were read or written."""
        self.rows: dict[ItemId, Contents] = {}
        """Of rows that were read and not written since."""

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether what is known is true. Other threads that use this store wait meanwhile."""
        if self._collection is None:
            yield False
            return
        with self._lock:
            now = self._position()
            if now is None or now != self._at:
                self.forget()
                self._at = now
            yield now is not None

    def _position(self) -> tuple[Any, int] | None:
        # Not part of its interface: without it, everything is read again, which is slow but right.
        collection = self._collection() if self._collection is not None else None
        written = getattr(collection, "_next_seq", None)
        return (collection, written) if isinstance(written, int) else None

    def saw(self, stamps: Mapping[ItemId, str | None], rows: Mapping[ItemId, Contents]) -> None:
        """Rows were read."""
        for item, stamp in stamps.items():
            self.stamps[item] = None if stamp is None else sys.intern(stamp)
        self.rows.update(rows)
        if (surplus := len(self.rows) - self._most) > 0:
            self.rows = dict(itertools.islice(self.rows.items(), surplus, None))

    def wrote(self, stamps: Mapping[ItemId, str | None]) -> bool:
        """Rows were written; whether nobody else wrote or deleted any since `held` began."""
        before, self._at = self._at, self._position()
        if before is None or self._at is None or self._at != (before[0], before[1] + len(stamps)):
            self.forget()
            return False
        self.stamps.update(stamps)
        for item in stamps:
            self.rows.pop(item, None)
        return True

    def inserted(self, stamps: Mapping[ItemId, str | None]) -> None:
        """Whole rows were written, some of them perhaps new."""
        if self.wrote(stamps) and self.keys is not None:
            new = [item for item in stamps if not self._among_keys(item)]
            if new:
                self.keys += new
                self.keys.sort(key=order_key)

    def _among_keys(self, item: ItemId) -> bool:
        assert self.keys is not None
        place = bisect.bisect_left(self.keys, order_key(item), key=order_key)
        return place < len(self.keys) and self.keys[place] == item

    def between(self, after: ItemId | None, up_to: ItemId | None, limit: int) -> list[ItemId]:
        """The next `limit` keys beyond `after` and not beyond `up_to`."""
        assert self.keys is not None
        first = 0 if after is None else bisect.bisect_right(self.keys, order_key(after), key=order_key)
        end = len(self.keys) if up_to is None else bisect.bisect_right(self.keys, order_key(up_to), key=order_key)
        return self.keys[first : max(first, min(end, first + max(limit, 0)))]

    def unread(self, items: Iterable[ItemId]) -> list[ItemId]:
        """Those whose stamps are not known."""
        return [item for item in items if item not in self.stamps]

    def there(self, items: Sequence[ItemId], *, with_contents: bool) -> bool:
        """Whether all of these are known to exist; with `contents`, whether what lies in them is known too."""
        known: Mapping[ItemId, Any] = self.rows if with_contents else self.stamps
        return all(item in known for item in items)
