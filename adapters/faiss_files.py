"""The files of a FAISS folder: the user's two, and ours in `.migrator/` beside them.

    index.faiss                  the user's index; replaced by an atomic rename and in no other way
    items.parquet                the user's items; replaced only when items are inserted or removed
    .migrator/lock               held by the one writer; lock.json says who that is
    .migrator/segments/N.parquet vectors of one write, until they are part of index.faiss
    .migrator/stamps/N.parquet   stamps of the vectors that index.faiss holds
    .migrator/original.faiss     index.faiss as it was before the first publication
    .migrator/changes/N.parquet  items inserted or removed, until they are part of the user's two files
    .migrator/next.json          both files are to be replaced by items.next and index.next, and this has begun
    .migrator/created            the folder was made by migrator

Every file of ours is written to a temporary name, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import ItemId, StoreBusy, StoreRejected, Vectors
from adapters.faiss_changes import Change
from adapters.faiss_index import Index, read_index
from adapters.files import sync_folder, translated

if TYPE_CHECKING:
    import filelock
    import pyarrow as pa

FORMAT = "1"

Identity = tuple[int, int, int, int]  # device, inode, size, mtime in ns


@dataclass(frozen=True, slots=True)
class Segment:
    """The vectors of one write. `replaced` holds the checksum of the vector that index.faiss had for each item."""

    ids: Sequence[ItemId]
    vectors: Vectors  # (n, dim)
    stamp: str | None
    replaced: NDArray[np.uint64]  # (n,)


@dataclass(frozen=True, slots=True)
class Stamps:
    """Stamps of the published vectors: each holds for an item as long as its vector has this checksum."""

    ids: Sequence[ItemId]
    stamps: Sequence[str | None]
    """None: no stamp, but only a rebuild of a quantised index has changed the vector since the original."""
    checksums: NDArray[np.uint64]
    unbalanced: bool
    """Vectors were replaced since the index was last trained."""


@dataclass(frozen=True, slots=True)
class Items:
    """The rows of items.parquet, in the order of their ids."""

    ids: Sequence[ItemId]  # ascending
    faiss_ids: NDArray[np.int64] | None
    """The column `faiss_id`, if there is one."""
    rows: NDArray[np.int64]
    """Row numbers in the file."""
    payload: pa.Table
    schema: pa.Schema
    """Of the file: the ids' columns, and the payload's as the application wrote them."""

    @property
    def strings(self) -> bool:
        """Whether ids are strings."""
        import pyarrow as pa

        return not pa.types.is_integer(_value_type(self.schema.field("id").type))

    def table(self, ids: Sequence[ItemId], faiss_ids: NDArray[np.int64], payload: pa.Table) -> pa.Table:
        """A file's table with other items in it, of the same columns in the same order."""
        import pyarrow as pa

        columns: dict[str, Any] = {name: payload.column(name) for name in payload.schema.names}
        columns["id"] = pa.array(ids, pa.large_string() if self.strings else pa.int64())
        columns["faiss_id"] = pa.array(faiss_ids)
        table = pa.table({name: columns[name] for name in self.schema.names})
        return table.cast(self.schema)

    def empty_table(self) -> pa.Table:
        """A file's table without items."""
        return self.schema.empty_table()


class Folder:
    """A folder with `index.faiss` and `items.parquet`. Raises `StoreRejected` if it is not there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))
        self.alias = os.path.abspath(path) if os.path.islink(path) else None  # noqa: PTH100, PTH114 - link kept
        self.index = self.path / "index.faiss"
        self.items = self.path / "items.parquet"
        self.ours = self.path / ".migrator"
        self.changes = self.ours / "changes"
        self.created = self.ours / "created"
        self._next = {self.items: self.ours / "items.next", self.index: self.ours / "index.next"}
        self._next_record = self.ours / "next.json"
        self.segments = self.ours / "segments"
        self.stamps = self.ours / "stamps"
        self.original = self.ours / "original.faiss"
        self._numbers: dict[Path, int] = {}
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise StoreRejected(f"store folder {self.path} {what}: it must hold index.faiss and items.parquet")
        for file in (self.index, self.items):
            if not file.is_file():
                raise StoreRejected(
                    f"{file} does not exist: a FAISS store is a folder with index.faiss and items.parquet"
                )

    # -- the user's files -----------------------------------------------------------------------------------------

    def identity(self) -> tuple[Identity, Identity]:
        """Tells generations of the two files apart."""
        with translated(self.path):
            return identity(self.live(self.index).stat()), identity(self.live(self.items).stat())

    def live(self, file: Path) -> Path:
        """Where a user's file is: a killed process may have left the next one beside it."""
        following = self._next[file]
        return following if self._next_record.exists() and following.exists() else file

    def read_index(self, path: Path) -> Index:
        """The index in `path`."""
        with translated(path), path.open("rb") as file:
            if file.read(2) == b"IB":
                raise StoreRejected(f"{path} is a binary index: embeddings need one of float vectors")
            file.seek(0)
            return read_index(str(path), file.read)

    def read_items(self) -> Items:
        """The items table, checked: ids of one type, none missing, none twice."""
        import pyarrow as pa

        path = self.live(self.items)
        table = _read_parquet(path)
        names = table.schema.names
        if len(set(names)) < len(names):
            raise StoreRejected(f"{path} has two columns of the same name")
        if "id" not in names:
            raise StoreRejected(f"{path} has no column `id`: its columns are {', '.join(names) or 'none'}")
        try:
            ids: list[ItemId] = _plain(table.column("id"), path, "id").to_pylist()
            faiss_ids = None
            if "faiss_id" in names:
                column = _plain(table.column("faiss_id"), path, "faiss_id")
                if column.type != pa.int64():
                    raise StoreRejected(f"{path}: the column `faiss_id` must be integers, it is {column.type}")
                faiss_ids = column.to_numpy()
            payload = _to_python_times(table.drop_columns([c for c in ("id", "faiss_id") if c in names]))
        except (pa.ArrowException, ValueError) as error:
            raise StoreRejected(f"{path} cannot be read: {_line(error)}") from error
        rows = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        ordered = [ids[row] for row in rows]
        for one, other in itertools.pairwise(ordered):
            if one == other:
                raise StoreRejected(f"{path} holds the id {one!r} more than once: ids must be unique")
        faiss_ids = None if faiss_ids is None else faiss_ids[rows]
        return Items(ordered, faiss_ids, rows, payload.combine_chunks(), table.schema)

    # -- the lock -------------------------------------------------------------------------------------------------

    def lock(self) -> filelock.BaseFileLock:
        """Makes `.migrator/` and takes its lock; it dies with the process. Raises `StoreBusy` at once if it is held."""
        import filelock

        with translated(self.ours):
            for folder in (self.ours, self.segments, self.stamps, self.changes):
                folder.mkdir(exist_ok=True)
            lock = filelock.FileLock(self.ours / "lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise StoreBusy(f"{self.path} is being written by {self._holder()}") from None
            try:
                holder = {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                self._write(self.ours / "lock.json", lambda file: file.write(json.dumps(holder).encode()))
                for leftover in self.ours.glob("**/*.tmp"):
                    leftover.unlink()
                self._finish_replacement()
            except BaseException:
                lock.release()
                raise
        return lock

    def _holder(self) -> str:
        try:
            holder = json.loads((self.ours / "lock.json").read_bytes())
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def delete(self) -> None:
        """Deletes the two files and ours, and the folder if nothing else lies in it. Call without the lock."""
        with translated(self.path):
            # The index first: without it this is no collection any more, whatever a kill leaves.
            for file in (self.index, self.items):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.ours, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()
            sync_folder(self.path.parent)

    # -- segments and stamps --------------------------------------------------------------------------------------

    def segment_files(self) -> list[Path]:
        """Segments in the order in which they were written."""
        return _numbered(self.segments)

    def stamp_files(self) -> list[Path]:
        """Stamps in the order in which they were written."""
        return _numbered(self.stamps)

    def write_segment(self, segment: Segment) -> None:
        """Makes a segment durable, as the latest."""
        import pyarrow as pa

        vectors = np.ascontiguousarray(segment.vectors, "<f4")
        width = 4 * vectors.shape[1]
        table = pa.table(
            {
                "id": _id_array(segment.ids),
                "vector": pa.Array.from_buffers(pa.binary(width), len(vectors), [None, pa.py_buffer(vectors)]),
                "replaced": pa.array(segment.replaced),
            }
        )
        metadata = {} if segment.stamp is None else {"stamp": segment.stamp}
        self._write_parquet(self._next_file(self.segments), table, metadata)

    def read_segment(self, path: Path) -> Segment:
        """A segment as it was written."""
        table, metadata = _read_ours(path)
        return Segment(
            table.column("id").to_pylist(),
            _vectors(table.column("vector")),
            metadata.get("stamp"),
            table.column("replaced").to_numpy(),
        )

    def write_stamps(self, stamps: Stamps) -> Path:
        """Makes stamps durable, as the latest; returns their file."""
        import pyarrow as pa

        table = pa.table(
            {
                "id": _id_array(stamps.ids),
                "stamp": pa.array(stamps.stamps, pa.string()),
                "checksum": pa.array(stamps.checksums),
            }
        )
        path = self._next_file(self.stamps)
        self._write_parquet(path, table, {"unbalanced": json.dumps(stamps.unbalanced)})
        return path

    def read_stamps(self, path: Path) -> Stamps:
        """Stamps as they were written."""
        table, metadata = _read_ours(path)
        return Stamps(
            table.column("id").to_pylist(),
            table.column("stamp").to_pylist(),
            table.column("checksum").to_numpy(),
            json.loads(metadata["unbalanced"]),
        )

    def change_files(self) -> list[Path]:
        """Changes in the order in which they were written."""
        return _numbered(self.changes)

    def write_change(self, change: Change) -> None:
        """Makes a change durable, as the latest."""
        import pyarrow as pa

        columns: dict[str, Any] = {"id": _id_array(change.ids), "replaced": pa.array(change.replaced)}
        if change.vectors is not None:
            assert change.payload is not None
            vectors = np.ascontiguousarray(change.vectors, "<f4")
            kind = pa.binary(4 * vectors.shape[1])
            columns["vector"] = pa.Array.from_buffers(kind, len(vectors), [None, pa.py_buffer(vectors)])
            columns["stamp"] = pa.array(change.stamps, pa.string())
            for name in change.payload.schema.names:
                columns[f"payload.{name}"] = change.payload.column(name)
        self._write_parquet(self._next_file(self.changes), pa.table(columns), {})

    def read_change(self, path: Path) -> Change:
        """A change as it was written."""
        table, _ = _read_ours(path)
        ids, replaced = table.column("id").to_pylist(), table.column("replaced").to_numpy()
        if "vector" not in table.schema.names:
            return Change(ids, replaced)
        payload = table.select([name for name in table.schema.names if name.startswith("payload.")])
        payload = payload.rename_columns([name.removeprefix("payload.") for name in payload.schema.names])
        return Change(ids, replaced, _vectors(table.column("vector")), payload, table.column("stamp").to_pylist())

    def remove(self, files: Sequence[Path]) -> None:
        """Removes files in the order given."""
        with translated(self.ours):
            for file in files:
                file.unlink(missing_ok=True)
            for folder in {file.parent for file in files}:
                sync_folder(folder)

    # -- publishing -----------------------------------------------------------------------------------------------

    def prepare(self, write_content: Callable[[Callable[[bytes], object]], object]) -> Path:
        """A file that is ready to become index.faiss: complete, durable, with the permissions of the present one."""
        path = self.ours / "index.faiss.tmp"

        def write(file: IO[bytes]) -> None:
            present = self.index.stat()
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), present.st_uid, present.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(present.st_mode))
            write_content(file.write)

        with translated(self.index):
            self._write_durably(path, write)
        return path

    def replace_index(self, path: Path) -> None:
        """The instant of publication: `path` becomes index.faiss."""
        with translated(self.index):
            path.replace(self.index)
            sync_folder(self.path)

    def replace_both(self, index: Path, table: pa.Table) -> None:
        """Replaces items.parquet and index.faiss; `index` is a file from `prepare`.

        Once next.json is there the replacement will be completed, if not by this process then by the next writer;
        readers of this package take the next files meanwhile.
        """
        import pyarrow.parquet as pq

        mode = stat.S_IMODE(self.items.stat().st_mode)
        with translated(self.items):
            self._write(self._next[self.items], lambda file: pq.write_table(table, file))
            self._next[self.items].chmod(mode)
            index.replace(self._next[self.index])
            sync_folder(self.ours)
            record = {file.name: identity(file.stat()) for file in self._next}
            self._write(self._next_record, lambda file: file.write(json.dumps(record).encode()))
        self._finish_replacement()

    def _finish_replacement(self) -> None:
        """Completes a replacement that has begun, unless the application has replaced a file since."""
        with translated(self.path):
            if self._next_record.exists():
                record = json.loads(self._next_record.read_bytes())
                for file, following in self._next.items():
                    if following.exists() and list(identity(file.stat())) == record[file.name]:
                        following.replace(file)
                sync_folder(self.path)
                self._next_record.unlink()
                sync_folder(self.ours)
            for following in self._next.values():
                following.unlink(missing_ok=True)

    def keep_original(self) -> None:
        """Keeps index.faiss as it is now, so that it can be published again bit for bit."""
        temporary = self.ours / "original.tmp"
        with translated(self.original):
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.index, temporary)
            except OSError:  # not every file system has hard links
                with self.index.open("rb") as source:
                    self._write_durably(temporary, lambda file: shutil.copyfileobj(source, file))
            temporary.replace(self.original)
            temporary.unlink(missing_ok=True)  # a rename onto a link to the same file leaves both names
            sync_folder(self.ours)

    def copy_original(self, write: Callable[[bytes], object]) -> None:
        """Hands the bytes of the original to `write`."""
        with self.original.open("rb") as file:
            while block := file.read(1 << 20):
                write(block)

    # -- writing --------------------------------------------------------------------------------------------------

    def _next_file(self, folder: Path) -> Path:
        if folder not in self._numbers:  # there is one writer: nobody else takes a number
            files = _numbered(folder)
            self._numbers[folder] = int(files[-1].stem) if files else 0
        self._numbers[folder] += 1
        return folder / f"{self._numbers[folder]:010d}.parquet"

    def _write_parquet(self, path: Path, table: pa.Table, metadata: dict[str, str]) -> None:
        import pyarrow.parquet as pq

        table = table.replace_schema_metadata({"format": FORMAT, **metadata})
        with translated(path):
            self._write(
                path,
                # Embeddings hardly compress; page checksums notice a damaged disk.
                lambda file: pq.write_table(
                    table, file, compression="none", use_dictionary=["stamp"], write_page_checksum=True
                ),
            )

    def _write(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        self._write_durably(temporary, write)
        temporary.replace(path)
        sync_folder(path.parent)

    def _write_durably(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        try:
            with path.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def make_folder(path: Path, index: Index, items: pa.Table) -> None:
    """A folder of migrator's own with these two files, there as a whole or not at all."""
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    with translated(path):
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / ".migrator").mkdir(parents=True)
        (temporary / ".migrator" / "created").touch()
        with (temporary / "index.faiss").open("wb") as file:
            index.write(file.write)
            file.flush()
            os.fsync(file.fileno())
        with (temporary / "items.parquet").open("wb") as file:
            pq.write_table(items, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)


def identity(status: os.stat_result) -> Identity:
    """What tells this content of a file from another, and stays with it when it is renamed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _vectors(column: pa.ChunkedArray) -> Vectors:
    """A column of fixed-size binaries as (n, dim) float32."""
    vectors = column.combine_chunks()
    dim = vectors.type.byte_width // 4
    data = np.frombuffer(vectors.buffers()[1], "<f4", len(vectors) * dim).reshape(len(vectors), dim)
    return data.astype(np.float32, copy=False)


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.parquet"), key=lambda path: int(path.stem)) if folder.is_dir() else []


def _id_array(ids: Sequence[ItemId]) -> pa.Array:
    import pyarrow as pa

    return pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())


def _plain(column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    """An id column as int64 or string."""
    import pyarrow as pa

    if column.null_count:
        raise StoreRejected(f"{path}: the column `{name}` has {column.null_count} empty rows: every item needs one")
    kind = _value_type(column.type)
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.large_string())
    raise StoreRejected(f"{path}: the column `{name}` must be integers or strings, it is {column.type}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _to_python_times(table: pa.Table) -> pa.Table:
    """Python's times count microseconds; nanoseconds, which pandas writes, are cut off."""
    import pyarrow as pa

    for number, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            kind = pa.timestamp("us", kind.tz)
        elif pa.types.is_duration(kind) and kind.unit == "ns":
            kind = pa.duration("us")
        elif pa.types.is_time64(kind) and kind.unit == "ns":
            kind = pa.time64("us")
        else:
            continue
        table = table.set_column(number, field.with_type(kind), table.column(number).cast(kind, safe=False))
    return table


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Not read_table(path): below a folder called a=b it adds a column `a`.
    with translated(path), path.open("rb") as file:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                return parquet.read()
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise StoreRejected(f"{path} cannot be read as Parquet: truncated or not one ({_line(error)})") from error


def _read_ours(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    table = _read_parquet(path)
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("format") != FORMAT:
        raise StoreRejected(f"{path} was written by another version of migrator: use that one")
    return table, metadata


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
