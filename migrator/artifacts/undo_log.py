"""The undo log: the vectors that a chunk is about to overwrite, durable before the first of them is.

One Parquet file a chunk, in the artifacts folder (local, or any fsspec URL). A chunk that is repeated after a crash
keeps what its file already says: the first state seen of an item is the one that a rollback needs.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.artifacts.files import LogFiles, chunk_file
from migrator.errors import PreconditionFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.ledger import Chunk

ItemId = int | str


@dataclass(frozen=True, slots=True)
class OldVectors:
    """What lay in the store before a chunk was written."""

    ids: Sequence[ItemId]
    vectors: NDArray[np.float32]  # (n, dim)
    stamps: Sequence[str | None]


class UndoLog:
    """The undo files of one migration."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files
        self.folder = files.folder

    def record(self, chunk: Chunk, old: OldVectors, external: Collection[ItemId] = ()) -> None:
        """Makes the old vectors of a chunk durable. Items that its file already holds stay as they are there.

        Except `external`, which the application has written since: what it wrote is their old state now.
        """
        before = self.read(chunk)
        if before is not None:
            renewed = set(external)
            kept = [row for row, item in enumerate(before.ids) if item not in renewed]
            known = {before.ids[row] for row in kept}
            new = [row for row, item in enumerate(old.ids) if item not in known]
            if not new:
                return
            old = OldVectors(
                [*(before.ids[row] for row in kept), *(old.ids[row] for row in new)],
                np.concatenate([before.vectors[kept], old.vectors[new]]),
                [*(before.stamps[row] for row in kept), *(old.stamps[row] for row in new)],
            )
        self._files.write(chunk_file(chunk), _to_parquet(old))

    def read(self, chunk: Chunk) -> OldVectors | None:
        """What the chunk overwrote; None if it never came to writing."""
        content = self._files.read(chunk_file(chunk))
        return None if content is None else _from_parquet(content, self._files.path(chunk_file(chunk)))

    def drop(self) -> None:
        """Deletes the undo files. After that there is no way back to the old vectors."""
        self._files.drop()


def _to_parquet(old: OldVectors) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim = old.vectors.shape[1]
    vectors = np.ascontiguousarray(old.vectors, dtype="<f4")
    ids = [str(item) if isinstance(item, int) else json.dumps(item) for item in old.ids]  # dumps is slow
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
            "stamp": pa.array(old.stamps, pa.string()),
        }
    ).replace_schema_metadata({CHECKSUM: _checksum(ids, vectors, old.stamps)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False)  # embeddings hardly compress
    return sink.getvalue()


def _from_parquet(content: bytes, path: str) -> OldVectors:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: Any = pq.read_table(io.BytesIO(content), use_threads=False)
        column = table.column("vector").combine_chunks()
        vectors = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        ids, stamps = table.column("id").to_pylist(), table.column("stamp").to_pylist()
        if table.schema.metadata[CHECKSUM] != _checksum(ids, vectors, stamps):
            raise ValueError("its checksum does not match")
        return OldVectors([json.loads(item) for item in ids], vectors, stamps)
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise PreconditionFailed(
            f"undo log {path} is damaged ({reason}): restore this file from a backup, then continue"
        ) from error


CHECKSUM = b"sha256"


def _checksum(ids: Sequence[str], vectors: NDArray[np.float32], stamps: Sequence[str | None]) -> bytes:
    """Of all that a rollback takes from the file: Parquet's own checksums leave its metadata out."""
    return hashlib.sha256(json.dumps([ids, stamps]).encode() + vectors.tobytes()).hexdigest().encode()
