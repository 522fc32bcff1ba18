"""What was copied into a shadow, and from what: the digests by which later changes on either side are found.

One Parquet file a chunk in the artifacts folder. An item is entered as begun before it is written to the shadow, and
with its digests when it lies there: one that is only begun is copied again, or removed if it is gone by then.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import Capabilities, FurtherVectors, ItemId, Page, Payload, Sparse, Vectors
from migrator.artifacts.files import LogFiles, chunk_file

if TYPE_CHECKING:
    from migrator.ledger import Chunk


SKETCH, CELL = 8, 0.01
"""Projections of a vector, and their resolution: vectors of cosine 0.999 look alike in 3 cases of a million, while a
wrong last bit changes the sketch of one vector in some thousands, which costs a copy."""


class Copy(NamedTuple):
    """Digests of an item when it was copied."""

    source: int
    """Of vectors and payload in the source, from which the copy was made."""
    shadow: int
    """Of vectors and payload in the shadow, as read back after writing."""


BEGUN = Copy(-1, -1)
"""Digests that no item has: the copy may or may not be there."""

Copies: TypeAlias = dict[ItemId, Copy]


def digests(page: Page, can: Capabilities) -> list[int]:
    """A 63-bit digest of each item's vectors and payload, the same whenever the store that `can` reads it.

    A store that scales vectors may give back another last bit than before: there a coarse sketch stands for the
    vector (eight random projections, as in locality-sensitive hashing). Of approximations only the payload counts.
    """
    if not can.exact_vectors:
        vectors = [b""] * len(page)
    elif can.normalises:
        vectors = [row.tobytes() for row in _sketch(page.vectors)]
    else:
        vectors = [row.tobytes() for row in np.ascontiguousarray(page.vectors, "<f4")]
    further = [further_digest(each) for each in page.further] if page.further is not None else [b""] * len(page)
    return [
        _digest(payload, vector + more) for payload, vector, more in zip(page.payloads, vectors, further, strict=True)
    ]


def further_digest(further: FurtherVectors) -> bytes:
    """A digest of an item's further vectors; of those of unit length, which a store may have scaled, by a sketch."""
    parts: list[bytes] = []
    for name, vector in sorted(further.items()):
        if isinstance(vector, Sparse):
            content = vector.indices.astype("<u4").tobytes() + vector.values.astype("<f4").tobytes()
        else:
            rows = np.atleast_2d(np.asarray(vector, "<f4"))
            scaled = np.allclose(np.linalg.norm(rows, axis=1), 1, rtol=0, atol=1e-3)
            content = _sketch(rows).tobytes() if scaled else rows.tobytes()
        parts.append(json.dumps([name, np.shape(vector), len(content)]).encode() + content)
    return hashlib.blake2b(b"".join(parts), digest_size=8).digest() if parts else b""


def _sketch(vectors: Vectors) -> NDArray[np.int32]:
    return np.rint(vectors @ _projections(vectors.shape[1]) / CELL).astype("<i4")


@lru_cache(maxsize=16)
def _projections(dim: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal((dim, SKETCH))


def _digest(payload: Payload, vectors: bytes) -> int:
    text = json.dumps(payload, sort_keys=True, default=repr).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(vectors + text, digest_size=8).digest()) >> 1


class CopyLog:
    """The copy files of one migration."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files

    def record(self, chunk: Chunk, copies: Copies) -> None:
        """Adds entries to a chunk's file; a newer one of an item replaces the older."""
        self._files.write(chunk_file(chunk), _to_parquet({**self.read(chunk), **copies}))

    def read(self, chunk: Chunk) -> Copies:
        """What the chunk has copied; nothing where its file is missing or damaged, so that it is copied again."""
        content = self._files.read(chunk_file(chunk))
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
