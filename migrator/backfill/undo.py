"""The undo log: the vectors that a chunk is about to overwrite, durable before the first of them is.

One Parquet file a chunk, in the artifacts folder (local, or any fsspec URL). A chunk that is repeated after a crash
keeps what its file already says: the first state seen of an item is the one that a rollback needs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.errors import Refused, Unavailable

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
    """The undo files of one migration, under `<artifacts>/<name>/undo-<key>/`.

    `key` must be the migration's own for ever: a ledger that begins anew must not find the files of an earlier one.
    """

    def __init__(self, artifacts: str, name: str, key: str) -> None:
        import fsspec

        self._fs, root = fsspec.core.url_to_fs(artifacts)
        self._local = self._fs.protocol == "file" or "file" in self._fs.protocol
        self.folder = f"{root.rstrip('/')}/{name}/undo-{key}"

    def _path(self, chunk: Chunk) -> str:
        return f"{self.folder}/{chunk.pass_number:04d}-{chunk.ordinal:08d}.parquet"

    def record(self, chunk: Chunk, old: OldVectors) -> None:
        """Makes the old vectors of a chunk durable. Items that its file already holds stay as they are there."""
        before = self.read(chunk)
        if before is not None:
            known = set(before.ids)
            new = [row for row, item in enumerate(old.ids) if item not in known]
            if not new:
                return
            old = OldVectors(
                [*before.ids, *(old.ids[row] for row in new)],
                np.concatenate([before.vectors, old.vectors[new]]),
                [*before.stamps, *(old.stamps[row] for row in new)],
            )
        self._write(self._path(chunk), _to_parquet(old))

    def read(self, chunk: Chunk) -> OldVectors | None:
        """What the chunk overwrote; None if it never came to writing."""
        path = self._path(chunk)
        try:
            content = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"undo log {path}: {error.strerror or error}; try again") from error
        return _from_parquet(content, path)

    def _write(self, path: str, content: bytes) -> None:
        try:
            if self._local:
                _make_folder_durably(self.folder)
                _write_durably(path, content)
            else:
                self._fs.makedirs(self.folder, exist_ok=True)
                self._fs.pipe_file(path, content)  # an object store shows a whole object or none
        except OSError as error:
            raise Unavailable(
                f"undo log {path}: {error.strerror or error}; nothing was overwritten, run the command again"
            ) from error

    def drop(self) -> None:
        """Deletes the undo files. After that there is no way back to the old vectors."""
        if self._fs.exists(self.folder):
            self._fs.rm(self.folder, recursive=True)


def _to_parquet(old: OldVectors) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim = old.vectors.shape[1]
    vectors = np.ascontiguousarray(old.vectors, dtype="<f4")
    ids = [json.dumps(item) for item in old.ids]
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
        raise Refused(f"undo log {path} is damaged ({reason}): restore this file from a backup, then go on") from error


CHECKSUM = b"sha256"


def _checksum(ids: Sequence[str], vectors: NDArray[np.float32], stamps: Sequence[str | None]) -> bytes:
    """Of all that a rollback takes from the file: Parquet's own checksums leave its metadata out."""
    return hashlib.sha256(json.dumps([ids, stamps]).encode() + vectors.tobytes()).hexdigest().encode()


def _write_durably(path: str, content: bytes) -> None:
    """Writes a file so that after a crash it is there whole or not at all: temporary file, fsync, rename, fsync."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:  # noqa: PTH123 - fsspec gives plain strings
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    except OSError:
        if os.path.exists(temporary):  # noqa: PTH110
            os.unlink(temporary)  # noqa: PTH108
        raise
    _sync_folder(os.path.dirname(path))  # noqa: PTH120


def _make_folder_durably(folder: str) -> None:
    if os.path.isdir(folder):  # noqa: PTH112
        return
    above = os.path.dirname(folder)  # noqa: PTH120
    _make_folder_durably(above)
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    _sync_folder(above)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
