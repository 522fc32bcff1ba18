"""The folder of Qdrant Edge and its shards, opened through the engine; its errors translated."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from migrator.adapters.base import StoreBusy, StoreError, StoreRejected, StoreUnavailable
from migrator.adapters.files import FORBIDDEN, replace_link, sync_folder, translated
from migrator.adapters.vectors import one_line

if TYPE_CHECKING:
    from qdrant_edge import EdgeShard

T = TypeVar("T")

CONFIG = "edge_config.json"
LOG_FILES = 8  # of 32 MiB and more: what is not flushed is read again when the shard is opened
DAMAGED = "is damaged, or of another version: put a backup in its place, or use that version"


class Folder:
    """The shards of a folder. Each is opened once, for all stores that use it, and closed with the last of them."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))
        self._open: dict[str, Shard] = {}
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise StoreRejected(f"{self.path} {what}: correct `path` of the store")
        if _is_shard(self.path):
            raise StoreRejected(
                f"{self.path} is a shard: set `path` to {self.path.parent} and `collection` to {self.path.name}"
            )

    def resolve(self, collection: str) -> tuple[str, str | None]:
        """A collection's own name, and the alias if it was that."""
        place = self._place(collection)
        with translated(self.path):
            if not place.is_symlink():
                return self._checked(collection), None
            target = Path(os.path.realpath(place))
            if not target.is_dir():  # nothing there, or links in a circle
                raise StoreRejected(f"the alias {place} leads nowhere: point it at a collection's folder")
        if target.parent != self.path:
            raise StoreRejected(f"the alias {place} leads to {target}: point it at a collection beside it")
        return self._checked(target.name), collection

    def exists(self, collection_id: str) -> bool:
        """Whether there is a collection of that name."""
        place = self._place(collection_id)
        with translated(self.path):
            return not place.is_symlink() and _is_shard(place)

    def aliases(self) -> dict[str, str]:
        """Alias -> name of the collection that it leads to."""
        with translated(self.path):
            links = [place for place in self.path.iterdir() if place.is_symlink() and not place.name.startswith(".")]
        targets = {place.name: Path(os.path.realpath(place)) for place in links}
        return {alias: target.name for alias, target in targets.items() if target.parent == self.path}

    def point(self, alias: str, to: str) -> None:
        """Points an existing alias at a collection, in one step."""
        place = self._place(alias)
        if not place.is_symlink():
            raise StoreRejected(f"{self.path} has no alias {alias!r}, which would be a symbolic link")
        if not self.exists(to):
            raise StoreRejected(f"{self.path} has no collection {to!r} to point {alias!r} at")
        replace_link(place, Path(to))

    def acquire(self, collection_id: str) -> Shard:
        """A collection's shard, for one more user. Give it to `release` in the end."""
        shard = self._open.get(collection_id)
        if shard is None:
            shard = self._open[collection_id] = Shard(self.path / self._checked(collection_id))
        shard.users += 1
        return shard

    def release(self, shard: Shard) -> None:
        """Closes the shard with its last user."""
        shard.users -= 1
        if shard.users == 0:
            shard.close()
            if self._open.get(shard.path.name) is shard:
                del self._open[shard.path.name]

    def create(self, collection_id: str, config: Mapping[str, Any], indexes: Mapping[str, Any]) -> None:
        """An empty shard with these settings and payload indexes: there as a whole or not at all."""
        from qdrant_edge import UpdateOperation

        place, temporary = self._place(collection_id), self.path / f".{collection_id}.new"
        with translated(place):
            if os.path.lexists(place):  # a link that leads nowhere, too
                raise StoreRejected(f"{place} is in the way of a new collection: move it")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            # The engine makes what its settings describe, and keeps those that this program does not know.
            (temporary / CONFIG).write_text(json.dumps(config))
            shard = Shard(temporary)
            for field, schema in indexes.items():
                shard.call("update", UpdateOperation.create_field_index(field, schema))
            shard.call("flush")
            shard.close()
            temporary.rename(place)
            sync_folder(self.path)

    def remove(self, collection_id: str) -> None:
        """Deletes a collection: a kill leaves it as it was, or a hidden remainder that `remove_leftovers` finds."""
        shard = self._open.pop(collection_id, None)
        if shard is not None:
            shard.close()
        place = self._place(collection_id)
        remainder = self.path / f".{collection_id}.gone"
        with translated(place):
            shutil.rmtree(remainder, ignore_errors=True)
            place.rename(remainder)
            sync_folder(self.path)
            shutil.rmtree(remainder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Deletes what a killed `remove` left."""
        for remainder in self.path.glob(".*.gone"):
            shutil.rmtree(remainder, ignore_errors=True)

    def _checked(self, collection_id: str) -> str:
        place = self.path / collection_id
        if _is_shard(place):
            return collection_id
        if place.is_dir():
            raise StoreRejected(f"{place} is not a shard of qdrant-edge: it has no segments")
        names = sorted(found.name for found in self.path.iterdir() if _is_shard(found))
        there = f"there are {', '.join(names[:20])}" if names else "the folder has no collections"
        raise StoreRejected(f"{self.path} has no collection or alias {collection_id!r}, {there}: correct `collection`")

    def _place(self, name: str) -> Path:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise StoreRejected(f"{name!r} cannot be a collection in {self.path}: it must be a folder's plain name")
        return self.path / name


class Shard:
    """An open shard. Every call holds `guard`, so that a read and the write that follows from it are one step."""

    def __init__(self, path: Path) -> None:
        try:
            from qdrant_edge import EdgeShard
        except ModuleNotFoundError as error:
            raise StoreRejected(
                f"engine edge needs the library {error.name}: pip install 'advbct-migrator[qdrant-edge]'"
            ) from error
        self.path, self.users, self.guard = path, 0, threading.RLock()
        self._lock = self._locked()
        try:
            self._edge: EdgeShard = self._translated(lambda: EdgeShard.load(str(path)), DAMAGED)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            with translated(path):
                self.config: dict[str, Any] = json.loads((path / CONFIG).read_bytes())
            # Without a log there is no lock either, and a kill may leave a vector with another one's stamp.
            if self.config.get("wal_enabled") is False:
                raise StoreRejected(f"{path} has no write-ahead log (wal_enabled), which a migration needs")
            if (self.config.get("optimizers") or {}).get("prevent_unoptimized"):
                raise StoreRejected(f"{path} hides what is written (prevent_unoptimized): a migration must see it")
        except BaseException:
            self.close()
            raise

    def _locked(self) -> int:
        """A handle of the folder with a lock on it, which dies with the process.

        The engine checks its own lock, on the folder of the log, only after it has repaired the other files, which
        damages them for the process that has them open. So the lock is checked here, before the engine is called.
        """
        with translated(self.path):
            handle = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (self.path / "wal").is_dir():
                    log = os.open(self.path / "wal", os.O_RDONLY)
                    try:
                        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    finally:
                        os.close(log)
            except BlockingIOError as error:
                os.close(handle)
                raise self._busy() from error
            except BaseException:
                os.close(handle)
                raise
        return handle

    def _busy(self) -> StoreBusy:
        return StoreBusy(f"{self.path} is open in another process: stop the application, then try again")

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the engine's shard by its name."""
        return self.ask(lambda edge: getattr(edge, method)(*arguments))

    def ask(self, call: Callable[[EdgeShard], T]) -> T:
        """Makes a call; the engine's exceptions become this package's."""
        with self.guard:
            return self._translated(lambda: call(self._edge), "was refused by the engine")

    def sync(self) -> None:
        """Makes what was written survive a power failure.

        The log is enough, for the engine restores from it what its other files lack; to flush those takes ten times as
        long. They follow when the log has grown.
        """
        log = self.path / "wal"
        with self.guard:
            with translated(log):
                files = list(log.iterdir())
                for place in (*files, log):
                    sync_folder(place)
            if len(files) > LOG_FILES:
                self.call("flush")

    def close(self) -> None:
        """Flushes, and releases the locks. Safe to repeat."""
        with self.guard:
            if self._lock >= 0:
                with contextlib.suppress(StoreError):
                    self._translated(self._edge.close, "cannot be closed")
                os.close(self._lock)
                self._lock = -1

    def _translated(self, call: Callable[[], T], what: str) -> T:
        try:
            return call()
        except (TypeError, ValueError) as error:
            raise StoreRejected(f"{self.path}: the engine refused: {one_line(error)}") from error
        except Exception as error:  # the engine has no other
            raise self._of(one_line(error).removeprefix("Service runtime error: "), what) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the engine's language, and no Exception
                raise
            raise StoreRejected(f"{self.path} {DAMAGED} ({one_line(error)})") from error

    def _of(self, said: str, what: str) -> StoreError:
        if "WouldBlock" in said:
            return self._busy()
        if "not initialized" in said:
            return StoreRejected(f"{self.path} was closed")
        number = re.search(r"os error (\d+)", said)
        if number and int(number[1]) in FORBIDDEN:
            return StoreRejected(f"{self.path}: {said}: give this user the right to read and write it")
        if number or "No space left" in said:
            return StoreUnavailable(f"{self.path}: {said}: free space or repair the disk, then try again")
        return StoreRejected(f"{self.path} {what} ({said})")


def _is_shard(place: Path) -> bool:
    segments = place / "segments"
    return segments.is_dir() and any(segments.iterdir())
