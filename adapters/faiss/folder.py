"""The files of a FAISS collection: the user's, and its own in `.migrator/` beside the index.

    index.faiss                  the user's index; replaced by an atomic rename and in no other way
    items.parquet                the user's items, in one file or several; replaced only when items are inserted or
                                 removed
    *.npy                        the exact vectors that the index was built from, where the user has them; likewise
    .migrator/lock               held by the one writer; lock.json says who that is
    .migrator/segments/N.parquet vectors of one write, until they are part of index.faiss
    .migrator/stamps/N.parquet   stamps of the vectors that index.faiss holds
    .migrator/original.faiss     index.faiss as it was before the first publication
    .migrator/changes/N.parquet  items inserted or removed, until they are part of the user's two files
    .migrator/next.json          files are to be replaced by those in next/, and this has begun
    .migrator/vectors.json       files of vectors that are not those of the index any more
    .migrator/created            the folder was made by migrator

Beside an index of another name than index.faiss the folder is called `.migrator.<name>`: there may be several. Every
file of its own is written to a temporary name, fsynced and renamed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, StoreBusy, StoreRejected, Vectors
from migrator.adapters.faiss.changes import Change
from migrator.adapters.faiss.index import Index, read_index
from migrator.adapters.faiss.items import Items, read_items, read_parquet
from migrator.adapters.faiss.originals import Originals, read_originals
from migrator.adapters.files import sync_folder, translated

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


class Generation(NamedTuple):
    """What tells one state of the user's files from another."""

    of_index: Identity
    of_items: tuple[tuple[str, Identity], ...]
    of_vectors: tuple[tuple[str, Identity], ...]


class Folder:
    """The files of one collection: in the folder `path`, under the names above, or where `index` and `items` say.

    `items` and `vectors` are names of files, or patterns of them; the files of a pattern are in the order of their
    names, as the tools read them that write such folders. Symbolic links to files are followed and kept.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        index: str | os.PathLike[str] | None = None,
        items: Sequence[str] = (),
        vectors: Sequence[str] = (),
    ) -> None:
        self._items, self._vectors = tuple(items), tuple(vectors)
        self.alias: str | None = None
        self.is_folder = path is not None
        if path is not None:
            self.path = Path(os.path.realpath(path))
            self.alias = os.path.abspath(path) if os.path.islink(path) else None  # noqa: PTH100, PTH114 - link kept
            if not self.path.is_dir():
                what = "is not a folder" if self.path.exists() else "does not exist"
                raise StoreRejected(f"store folder {self.path} {what}: it must hold index.faiss and items.parquet")
            named = self.path / "index.faiss"
        else:
            assert index is not None
            named = Path(os.path.abspath(index))  # noqa: PTH100 - a link is told from its target
            self.path = Path(os.path.realpath(named.parent))
            named = self.path / named.name
            both = [os.path.realpath(file) for file in items] == [str(self.path / "items.parquet")]
            self.is_folder = named.name == "index.faiss" and both
        if self.is_folder:
            self._items = (str(self.path / "items.parquet"),)
        self.named_index = named
        self.index = Path(os.path.realpath(named))
        self.collection_id = str(self.path if self.is_folder else named)
        """By which the collection is known: its folder, or its index where the files have other names."""
        self.own = self.path / (".migrator" if named.name == "index.faiss" else f".migrator.{named.name}")
        self.changes = self.own / "changes"
        self.created = self.own / "created"
        self.next = self.own / "next"
        self._next_record = self.own / "next.json"
        self.segments = self.own / "segments"
        self.stamps = self.own / "stamps"
        self.original = self.own / "original.faiss"
        self._outdated = self.own / "vectors.json"
        self._numbers: dict[Path, int] = {}

    def opened_as(self, collection_id: str) -> Folder:
        """The files of another collection of this name, or of this one."""
        if collection_id == self.collection_id and not self.is_folder:
            return Folder(index=self.named_index, items=self._items, vectors=self._vectors)
        return Folder(collection_id, vectors=self._vectors if collection_id == self.collection_id else ())

    # -- the user's files -----------------------------------------------------------------------------------------

    @property
    def items(self) -> str:
        """The files of items, for messages."""
        return _spelled(self._items)

    def item_files(self) -> list[Path]:
        """The files of items, in the order of their rows."""
        return _files(self._items)

    def vector_files(self) -> list[Path]:
        """The files of exact vectors, in the order of their rows; none where the user names none."""
        return _files(self._vectors)

    def missing(self) -> list[str]:
        """What of the user's files is not there, and what to do."""
        problems = []
        if not self.index.is_file():
            problems.append(f"{_absent(self.named_index)}: {self._advice()}")
        for patterns, advice in ((self._items, self._advice()), (self._vectors, "save them as .npy, or name others")):
            problems += [f"{_nothing(pattern)}: {advice}" for pattern in patterns if not _files([pattern])]
        return problems

    def _advice(self) -> str:
        if not self.is_folder:
            return "name the index as store.index and the Parquet files of its items as store.items"
        other = next((file for file in sorted(self.path.glob("*.index")) if file.is_file()), None)
        tables = sorted(self.path.glob("metadata/*.parquet"))
        if other is not None or tables:
            named = other.name if other is not None else "..."
            pattern = "metadata/*.parquet" if tables else "..."
            return (
                f"this folder is laid out otherwise: in place of store.path give store.index ({self.path / named}) "
                f"and store.items ({Path(glob.escape(str(self.path)), pattern)})"
            )
        return (
            "a FAISS store is a folder with index.faiss and items.parquet; where they have other names, give "
            "store.index and store.items"
        )

    def identity(self) -> Generation:
        """Tells generations of the files apart."""
        with translated(self.path):
            live = self._live_files()

            def of(files: Sequence[Path]) -> tuple[tuple[str, Identity], ...]:
                return tuple((str(file), identity(live(file).stat())) for file in files)

            return Generation(identity(live(self.index).stat()), of(self.item_files()), of(self.vector_files()))

    def live(self, file: Path) -> Path:
        """Where a user's file is: a killed process may have left the next one beside it."""
        return self._live_files()(file)

    def _live_files(self) -> Callable[[Path], Path]:
        following = {target: place for target, place, _ in self._replacement() if place.exists()}
        return lambda file: following.get(file, file)

    def read_index(self, path: Path) -> Index:
        """The index in `path`."""
        with translated(path), path.open("rb") as file:
            if file.read(2) == b"IB":
                raise StoreRejected(f"{path} is a binary index: embeddings need one of float vectors")
            file.seek(0)
            return read_index(str(path), file.read)

    def read_items(self) -> Items:
        """The items, checked: ids of one type, none missing, none twice."""
        return read_items(self.item_files(), self._live_files())

    def read_originals(self) -> Originals | None:
        """The exact vectors; None where there are none, or only outdated ones."""
        files = self.vector_files()
        return read_originals(files, self._live_files()) if files and not self.vectors_outdated() else None

    def vectors_outdated(self) -> bool:
        """Whether the files of vectors are those of before a migration that was finished."""
        try:
            outdated = json.loads(self._outdated.read_bytes())
        except FileNotFoundError:
            return False
        return bool(outdated == self._vectors_seen())

    def _vectors_seen(self) -> list[list[Any]]:
        return [[str(file), list(identity(file.stat()))] for file in self.vector_files()]

    def mark_vectors_outdated(self) -> None:
        """Writes down that the files of vectors are not those of the index any more."""
        if self.vector_files():
            with translated(self._outdated):
                self._write(self._outdated, lambda file: file.write(json.dumps(self._vectors_seen()).encode()))

    # -- the lock -------------------------------------------------------------------------------------------------

    def lock(self) -> filelock.BaseFileLock:
        """Makes `.migrator/` and takes its lock; it dies with the process. Raises `StoreBusy` at once if it is held."""
        import filelock

        with translated(self.own):
            for folder in (self.own, self.segments, self.stamps, self.changes, self.next):
                folder.mkdir(exist_ok=True)
            lock = filelock.FileLock(self.own / "lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise StoreBusy(f"{self.collection_id} is being written by {self._holder()}") from None
            try:
                holder = {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                self._write(self.own / "lock.json", lambda file: file.write(json.dumps(holder).encode()))
                self._finish_replacement()
                for leftover in self.own.glob("**/*.tmp"):
                    leftover.unlink()
                for file in (self.index, *self.item_files(), *self.vector_files()):
                    self._beside(file, "tmp").unlink(missing_ok=True)
            except BaseException:
                lock.release()
                raise
        return lock

    def remove_empty_folders(self) -> None:
        """Leaves nothing below `.migrator/` but files. Call with the lock.

        The lock's own file stays: removed while another process opens it, it would be no lock.
        """
        for folder in (self.segments, self.stamps, self.changes, self.next):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _holder(self) -> str:
        try:
            holder = json.loads((self.own / "lock.json").read_bytes())
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def delete(self) -> None:
        """Deletes index, items and `.migrator/`, and the folder if nothing else lies in it. Call without the lock.

        Items and vectors that lie under names of the user's own stay: other indexes may be made of them.
        """
        with translated(self.path):
            # The index first: without it this is no collection any more, whatever a kill leaves.
            for file in (self.named_index, *(self.item_files() if self.is_folder else ())):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.own, ignore_errors=True)
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
        with translated(self.own):
            for file in files:
                file.unlink(missing_ok=True)
            for folder in {file.parent for file in files}:
                sync_folder(folder)

    # -- publishing -----------------------------------------------------------------------------------------------

    def prepare(self, write_content: Callable[[Callable[[bytes], object]], object]) -> Path:
        """A file that is ready to become the index: complete, durable, with the permissions of the present one."""
        path = self._beside(self.index, "tmp")
        with translated(self.index):
            self._write_ready(path, self.index, lambda file: write_content(file.write))
        return path

    def _beside(self, file: Path, suffix: str) -> Path:
        """A name from which `file` can be replaced in one step: in our folder, or where a link leads, beside it."""
        if file.parent == self.path or self._on_one_disk(file):
            return self.own / f"{file.name}.{suffix}"
        return file.with_name(f".{file.name}.{suffix}")

    def _on_one_disk(self, file: Path) -> bool:
        return file.parent.stat().st_dev == self.path.stat().st_dev

    def _write_ready(self, path: Path, target: Path, write: Callable[[IO[bytes]], object]) -> None:
        """Writes a file durably, with owner and mode of the one that it will replace."""

        def write_all(file: IO[bytes]) -> None:
            present = target.stat()
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), present.st_uid, present.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(present.st_mode))
            write(file)

        self._write_durably(path, write_all)

    def replace_index(self, path: Path) -> None:
        """The instant of publication: `path` becomes the index."""
        with translated(self.index):
            path.replace(self.index)
            sync_folder(self.index.parent)

    def replace_files(self, index: Path, files: Mapping[Path, Callable[[IO[bytes]], object]]) -> None:
        """Replaces the index, by a file from `prepare`, and `files`, which are written by these functions.

        Once next.json is there the replacement will be completed, if not by this process then by the next writer;
        readers of this package take the next files meanwhile.
        """
        places: list[tuple[Path, Path]] = []
        try:
            for number, (target, write) in enumerate(files.items()):
                # Under a name that is swept away where a killed process has not come to write next.json.
                place = self.next / str(number) if self._on_one_disk(target) else self._beside(target, "tmp")
                places.append((target, place))
                with translated(target):
                    self._write_ready(place, target, write)
            following = self._beside(self.index, "next")
            places.append((self.index, following))
            with translated(self.index):
                index.replace(following)
                for folder in {place.parent for _, place in places}:
                    sync_folder(folder)
                record = [[str(target), str(place), identity(target.stat())] for target, place in places]
                self._write(self._next_record, lambda file: file.write(json.dumps({"files": record}).encode()))
        except BaseException:
            if not self._next_record.exists():
                for _, place in places:
                    place.unlink(missing_ok=True)
            raise
        self._finish_replacement()

    def _replacement(self) -> list[tuple[Path, Path, list[int]]]:
        """The files that are being replaced: which, by which, and what they were."""
        try:
            record = json.loads(self._next_record.read_bytes())
        except FileNotFoundError:
            return []
        try:
            return [(Path(target), Path(place), before) for target, place, before in record["files"]]
        except (LookupError, TypeError, ValueError) as error:
            raise StoreRejected(
                f"{self._next_record} was written by another version of migrator: use that one"
            ) from error

    def _finish_replacement(self) -> None:
        """Completes a replacement that has begun, unless the application has replaced a file since."""
        with translated(self.path):
            replacement = self._replacement()
            for target, place, before in replacement:
                if place.exists() and list(identity(target.stat())) == before:
                    place.replace(target)
                place.unlink(missing_ok=True)
            for folder in {target.parent for target, _, _ in replacement}:
                sync_folder(folder)
            if replacement:
                self._next_record.unlink()
                sync_folder(self.own)
            for leftover in [*self.next.glob("*"), self._beside(self.index, "next")]:
                leftover.unlink(missing_ok=True)

    def keep_original(self) -> None:
        """Keeps index.faiss as it is now, so that it can be published again bit for bit."""
        temporary = self.own / "original.tmp"
        with translated(self.original):
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.index, temporary)
            except OSError:  # not every file system has hard links
                with self.index.open("rb") as source:
                    self._write_durably(temporary, lambda file: shutil.copyfileobj(source, file))
            temporary.replace(self.original)
            temporary.unlink(missing_ok=True)  # a rename onto a link to the same file leaves both names
            sync_folder(self.own)

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


def _read_ours(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    table = read_parquet(path)
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("format") != FORMAT:
        raise StoreRejected(f"{path} was written by another version of migrator: use that one")
    return table, metadata


_MAGIC = re.compile(r"[*?[]")


def _files(patterns: Sequence[str]) -> list[Path]:
    """The files that these names and patterns stand for, those of a pattern in the order of their names.

    A pattern does not reach into collections that migrator has made. Links to files are followed.
    """
    found: list[Path] = []
    for pattern in patterns:
        if os.path.isfile(pattern):  # noqa: PTH113 - a name may look like a pattern
            found.append(Path(pattern))
        elif _MAGIC.search(pattern):
            names = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - a whole path
            found += [file for file in names if file.is_file() and not (file.parent / ".migrator" / "created").exists()]
    return [*dict.fromkeys(Path(os.path.realpath(file)) for file in found)]


def _spelled(patterns: Sequence[str]) -> str:
    return ", ".join(re.sub(r"\[([*?[])\]", r"\1", pattern) for pattern in patterns)


def _absent(file: Path) -> str:
    """Why there is no such file."""
    if file.is_symlink():
        return f"{file} is a symbolic link to {os.path.realpath(file)}, which does not exist"
    if file.is_dir():
        return f"{file} is a folder, not a file"
    return f"{file} does not exist"


def _nothing(pattern: str) -> str:
    """Why a name or pattern stands for no file."""
    there = Path(pattern).is_dir() or Path(pattern).is_symlink()
    return (
        f"no file is called {_spelled([pattern])}" if _MAGIC.search(pattern) and not there else _absent(Path(pattern))
    )
