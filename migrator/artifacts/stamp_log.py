"""Stamps for a store that has no room for them: kept as digests of item and vector in the artifacts folder.

An item carries a stamp while its vector is, bit for bit, the one that was written with it. So an application's write
takes the stamp away, and the digests can be durable before the write that they speak of: of a vector that never came
to lie in the store they say nothing. The price is that every look for stamps reads vectors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from migrator.adapters.base import (
    Capabilities,
    ForwardingStore,
    ItemId,
    Page,
    PayloadPage,
    StampPage,
    Store,
    VectorPage,
    Vectors,
    WriteReport,
)
from migrator.artifacts.files import LogFiles
from migrator.errors import PreconditionFailed

PAGE = 5_000
"""Items read at once when stamps are looked for."""


class StampLog:
    """Digest of item and vector -> the stamp it was written with last. About 140 bytes of memory an entry."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files
        self._stamps: dict[int, str | None] = {}
        self._known: set[str] = set()
        self._lock = threading.RLock()  # one thread reads while another writes

    def refresh(self) -> None:
        """Takes over what other processes have written down."""
        with self._lock:
            for name in self._files.names():
                if name not in self._known:
                    content = self._files.read(name)
                    if content is not None:
                        self._stamps.update(_from_parquet(content, self._files.path(name)))
                    self._known.add(name)

    def check(self) -> None:
        """Refuses a log that has lost files: without them new vectors would pass for the application's own."""
        numbers = {_number(name) for name in self._files.names()}
        lost = set(range(1, max(numbers, default=1) + 1)) - numbers
        if lost:
            raise PreconditionFailed(
                f"stamp log {self._files.folder} has lost {len(lost)} files (number {min(lost)} first): restore this "
                "folder from a backup, then continue"
            )

    def of(self, ids: Sequence[ItemId], vectors: Vectors) -> list[str | None]:
        """The stamps that these items carry with these vectors (n, dim)."""
        return [self._stamps.get(digest) for digest in _digests(ids, vectors)]

    def record(self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None) -> None:
        """Makes durable that these vectors (n, dim) bear `stamp`, once they lie in the store."""
        with self._lock:
            self.refresh()
            # Numbered, for a later entry wins; the process makes the name unique beside other writers.
            number = 1 + max(map(_number, self._known), default=0)
            name = f"{number:012d}-{os.getpid()}.parquet"
            entries: dict[int, str | None] = dict.fromkeys(_digests(ids, vectors), stamp)
            if stamp is None:  # of vectors that never bore a stamp there is nothing to take back
                entries = {digest: None for digest in entries if self._stamps.get(digest) is not None}
            if entries:
                self._files.write(name, _to_parquet(entries))
                self._stamps.update(entries)
                self._known.add(name)

    def drop(self) -> None:
        """Deletes the files."""
        self._files.drop()
        self._stamps.clear()
        self._known.clear()


class StampedStore(ForwardingStore):
    """A store without room for stamps, with a `StampLog` beside it."""

    def __init__(self, store: Store, log: StampLog) -> None:
        super().__init__(store)
        self._log = log

    @property
    def capabilities(self) -> Capabilities:
        """The store's, and stamps."""
        return dataclasses.replace(self._store.capabilities, stamps=True)

    def read(self, ids: Sequence[ItemId]) -> Page:
        """Whole items."""
        self._log.refresh()
        return self._stamped(self._store.read(ids))

    def read_vectors(self, ids: Sequence[ItemId]) -> VectorPage:
        """Vectors and stamps."""
        self._log.refresh()
        page = self._store.read_vectors(ids)
        return dataclasses.replace(page, stamps=self._log.of(page.ids, page.vectors))

    def read_payloads(self, ids: Sequence[ItemId]) -> PayloadPage:
        """Payloads and stamps; the vectors are read too."""
        page = self.read(ids)
        return PayloadPage(page.ids, page.payloads, page.stamps)

    def read_stamps(self, ids: Sequence[ItemId]) -> StampPage:
        """Stamps; the vectors are read too."""
        page = self.read_vectors(ids)
        return StampPage(page.ids, page.stamps)

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` items."""
        self._log.refresh()
        return self._stamped(self._store.scan(after=after, up_to=up_to, limit=limit))

    def _stamped(self, page: Page) -> Page:
        return dataclasses.replace(page, stamps=self._log.of(page.ids, page.vectors))

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Writes down the stamps, then the vectors."""
        if vectors.ndim == 2 and len(vectors) == len(ids):  # what else is wrong with a batch the store will say
            self._log.record(ids, vectors, stamp)
        return self._store.write_vectors(ids, vectors, stamp, expected)

    def insert(self, page: Page) -> WriteReport:
        """Writes down the stamps, then whole items."""
        for stamp in dict.fromkeys(page.stamps):
            rows = [row for row, carried in enumerate(page.stamps) if carried == stamp]
            self._log.record([page.ids[row] for row in rows], page.vectors[rows], stamp)
        return self._store.insert(page)

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids of items whose vector was not written with `stamp`."""
        found: list[ItemId] = []
        for item, carried in self._all(after) if limit > 0 else ():
            if carried != stamp:
                found.append(item)
                if len(found) == limit:
                    break
        return found

    def count(self, *, stamp: str | None = None) -> int:
        """Number of items; with `stamp`, of those whose vector was written with it."""
        if stamp is None:
            return self._store.count()
        return sum(carried == stamp for _, carried in self._all(None))

    def _all(self, after: ItemId | None) -> Iterator[tuple[ItemId, str | None]]:
        while True:
            page = self.scan(after=after, limit=PAGE)
            yield from zip(page.ids, page.stamps, strict=True)
            if len(page) < PAGE:
                return
            after = page.ids[-1]

    def clear_migration_state(self) -> None:
        """Drops the log too."""
        self._store.clear_migration_state()
        self._log.drop()


def _number(name: str) -> int:
    return int(name.split("-")[0])


def _digests(ids: Sequence[ItemId], vectors: Vectors) -> list[int]:
    rows = np.ascontiguousarray(vectors, "<f4")
    return [
        int.from_bytes(hashlib.blake2b(row.tobytes() + json.dumps(item).encode(), digest_size=8).digest())
        for item, row in zip(ids, rows, strict=True)
    ]


def _to_parquet(entries: dict[int, str | None]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "digest": pa.array(np.fromiter(entries, np.uint64, len(entries))),
            "stamp": pa.array(list(entries.values()), pa.string()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", write_page_checksum=True)
    return sink.getvalue()


def _from_parquet(content: bytes, path: str) -> dict[int, str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: Any = pq.read_table(io.BytesIO(content), use_threads=False, page_checksum_verification=True)
        return dict(zip(table.column("digest").to_pylist(), table.column("stamp").to_pylist(), strict=True))
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise PreconditionFailed(
            f"stamp log {path} is damaged ({reason}): restore this file from a backup, then continue"
        ) from error
