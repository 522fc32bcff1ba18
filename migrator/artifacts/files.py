"""Files that a migration leaves beside the ledger, durable before what depends on them is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.adapters.files import sync_folder
from migrator.errors import TemporarilyUnavailable

if TYPE_CHECKING:
    from migrator.ledger import Chunk


class LogFiles:
    """Files in a folder of their own, `<artifacts>/<name>/<kind>-<key>/`: a local one, or any fsspec URL.

    `key` belongs to the migration permanently: a new ledger must not find the files of an earlier one.
    """

    def __init__(self, artifacts: str, name: str, kind: str, key: str) -> None:
        import fsspec

        self._fs, root = fsspec.core.url_to_fs(artifacts)
        self._local = self._fs.protocol == "file" or "file" in self._fs.protocol
        self._kind = kind
        self.folder = f"{root.rstrip('/')}/{name}/{kind}-{key}"

    def path(self, name: str) -> str:
        """Where a file lies, whether there is one or not."""
        return f"{self.folder}/{name}"

    def names(self) -> list[str]:
        """The names of all files, sorted. Raises `TemporarilyUnavailable`."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise TemporarilyUnavailable(
                f"{self._kind} log {self.folder}: {error.strerror or error}; try again"
            ) from error
        return sorted(name for path in found if (name := path.rsplit("/", 1)[-1]).endswith(".parquet"))

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none. Raises `TemporarilyUnavailable`."""
        path = self.path(name)
        try:
            content: bytes = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TemporarilyUnavailable(f"{self._kind} log {path}: {error.strerror or error}; try again") from error
        return content

    def write(self, name: str, content: bytes) -> None:
        """Makes a file durable, whole or not at all. Raises `TemporarilyUnavailable`."""
        path = self.path(name)
        try:
            if self._local:
                _make_folder_durably(self.folder)
                _write_durably(path, content)
            else:
                self._fs.makedirs(self.folder, exist_ok=True)
                self._fs.pipe_file(path, content)  # an object store shows a whole object or none
        except OSError as error:
            raise TemporarilyUnavailable(
                f"{self._kind} log {path}: {error.strerror or error}; nothing was overwritten, run the command again"
            ) from error

    def drop(self) -> None:
        """Deletes all files."""
        if self._fs.exists(self.folder):
            self._fs.rm(self.folder, recursive=True)


def chunk_file(chunk: Chunk) -> str:
    """The name of a chunk's file in a log that has one per chunk."""
    return f"{chunk.pass_number:04d}-{chunk.ordinal:08d}.parquet"


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
    sync_folder(Path(path).parent)


def _make_folder_durably(folder: str) -> None:
    if os.path.isdir(folder):  # noqa: PTH112
        return
    above = os.path.dirname(folder)  # noqa: PTH120
    _make_folder_durably(above)
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    sync_folder(Path(above))
