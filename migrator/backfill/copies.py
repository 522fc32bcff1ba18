"""What was copied into a shadow, and from what: the digests by which later changes on either side are found.

One Parquet file a chunk in the artifacts folder. An entry is written after its item lies in the shadow, so an item
without one is copied again; a lost file costs work and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from adapters.base import ItemId, Page, Payload
from migrator.backfill.files import ChunkFiles

if TYPE_CHECKING:
    from migrator.ledger import Chunk


class Copy(NamedTuple):
    """Digests of an item when it was copied."""

    source: int
    """Of vector and payload in the source, from which the copy was made."""
    shadow: int
    """Of vector and payload in the shadow, as read back after writing."""


Copies: TypeAlias = dict[ItemId, Copy]


def digests(page: Page, *, vectors: bool = True) -> list[int]:
    """A 63-bit digest of each item's payload and, unless told otherwise, its vector."""
    assert page.payloads is not None
    if not vectors:
        return [_digest(payload, b"") for payload in page.payloads]
    assert page.vectors is not None
    rows = np.ascontiguousarray(page.vectors, "<f4")
    return [_digest(payload, row.tobytes()) for payload, row in zip(page.payloads, rows, strict=True)]


def _digest(payload: Payload, vector: bytes) -> int:
    text = json.dumps(payload, sort_keys=True, default=repr).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(vector + text, digest_size=8).digest()) >> 1


class CopyLog:
    """The copy files of one migration."""

    def __init__(self, files: ChunkFiles) -> None:
        self._files = files

    def record(self, chunk: Chunk, copies: Copies) -> None:
        """Adds entries to a chunk's file; a newer one of an item replaces the older."""
        self._files.write(chunk, _to_parquet({**self.read(chunk), **copies}))

    def read(self, chunk: Chunk) -> Copies:
        """What the chunk has copied; nothing where its file is missing or damaged, so that it is copied again."""
        content = self._files.read(chunk)
        return {} if content is None else _from_parquet(content)

    def drop(self) -> None:
        """Deletes the files."""
        self._files.drop()


def _to_parquet(copies: Copies) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": pa.array([json.dumps(item) for item in copies], pa.string()),
            "source": pa.array([copy.source for copy in copies.values()], pa.int64()),
            "shadow": pa.array([copy.shadow for copy in copies.values()], pa.int64()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def _from_parquet(content: bytes) -> Copies:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: Any = pq.read_table(io.BytesIO(content), use_threads=False)
        columns = (table.column(name).to_pylist() for name in ("id", "source", "shadow"))
        return {json.loads(item): Copy(source, shadow) for item, source, shadow in zip(*columns, strict=True)}
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError):
        return {}
