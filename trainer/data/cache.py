"""Prepared images on disk, so that no image is decoded and resized twice: shared by runs, kept across kills.

An image is found by the SHA-256 of its file and by the preprocessing that made its pixels, whatever its path or label.
For each preprocessing there is a folder with shards of two files: `<number>.u8` with pixels (rows, 3, H, W) and
`<number>.keys` with a row for each: the SHA-256 and the CRC-32 of the pixels. Pixels are durable before their keys are
written, so a row that has a key is whole, and what a kill left behind it is cut off.

Everything here can be made again from the images. So a damaged shard is thrown away rather than complained about.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from migrator.trainer.data.items import Excluded
from migrator.trainer.errors import ImageProblem, TrainingProblem
from migrator.trainer.files import sync_folder, write_json
from migrator.trainer.images.preprocessing import fingerprint_image

if TYPE_CHECKING:
    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.images.source import ImageSource

SHARD_BYTES = 2**28
MAX_SHARDS = 256
"""Large runs get larger shards: each one that is read costs one of the 1,024 files that a process may have open."""
CHUNK_BYTES = 2**25
CHUNK_IMAGES = 256
LOCK_POLL_SECONDS = 1.0

_KEY = np.dtype([("sha256", np.uint8, 32), ("crc32", "<u4")])
_FORMAT = 1

log = logging.getLogger(__name__)


def pixel_key(preprocessing: Preprocessing) -> str:
    """Names everything that decides an image's pixels, which mean and deviation do not: they are applied per batch."""
    return hashlib.sha256(json.dumps(_pixel_fields(preprocessing), sort_keys=True).encode()).hexdigest()[:16]


def _pixel_fields(preprocessing: Preprocessing) -> dict[str, object]:
    fields = preprocessing.declared()
    del fields["std"]
    if preprocessing.resize != "border":  # which pads with the mean colour
        del fields["mean"]
    if preprocessing.transform is not None:  # its name does not tell what it does today
        fields["output"] = hashlib.sha256(preprocessing.prepare(fingerprint_image()).tobytes()).hexdigest()
    return fields


class Pixels:
    """Prepared images as memory maps of the shards that hold them, in the order they were asked for.

    A shard stays locked against eviction until the last of its readers is gone.
    """

    def __init__(self, preprocessing: Preprocessing, shards: Sequence[NDArray[Any]], places: NDArray[np.int64]) -> None:
        self._shape = (3, *preprocessing.size)
        self._dtype = preprocessing.dtype
        self._shards = shards
        self._places = places  # (n, 2): number of the shard, row in it

    def __len__(self) -> int:
        return len(self._places)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The images of these rows, (b, 3, H, W), copied: uint8, or float32 where a transform makes them."""
        batch = np.empty((len(rows), *self._shape), self._dtype)
        for at, (shard, row) in enumerate(self._places[rows].tolist()):
            batch[at] = self._shards[shard][row]
        return batch


def open_pixels(folder: Path, preprocessing: Preprocessing, digests: Sequence[bytes]) -> Pixels | None:
    """The images with these SHA-256 digests from the cache in `folder`; None where any of them is not there.

    Waits for nobody, and so works beside a process that fills the cache. Raises TrainingProblem for a folder that
    cannot be read.
    """
    try:
        shelf = _Shelf(folder, preprocessing)
        if any(digest not in shelf.rows for digest in digests):
            return None
        places = np.array([shelf.rows[digest] for digest in digests], np.int64).reshape(-1, 2)
        numbers, places[:, 0] = np.unique(places[:, 0], return_inverse=True)
        shards = []
        for number in numbers.tolist():
            shard = shelf.shards[number]
            with shard.pixels.open("rb") as file:
                # The map holds a duplicate of this file's descriptor, and with it the lock.
                fcntl.flock(file, fcntl.LOCK_SH)
                if not os.fstat(file.fileno()).st_nlink:
                    return None
                shards.append(np.memmap(file, preprocessing.dtype, "r", shape=(shard.count, *shelf.shape)))
            with contextlib.suppress(PermissionError):  # a cache that may only be read evicts nothing
                os.utime(shard.keys)  # eviction starts with those used longest ago
    except FileNotFoundError:  # evicted just now
        return None
    except OSError as error:
        raise _unusable(folder, error) from error
    return Pixels(preprocessing, shards, places)


class ImageCache:
    """A cache that is being filled; one process at a time does that. A context manager, which waits for its turn.

    `limit` bounds the bytes of all images in the folder. Whole shards that were not used for longest, and are not
    used by this or another running process, give way. `waiting` is called every second until it is our turn.

    Raises TrainingProblem for a folder that is no image cache or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        preprocessings: Sequence[Preprocessing],
        *,
        limit: int,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.limit = limit
        self._preprocessings = {pixel_key(preprocessing): preprocessing for preprocessing in preprocessings}
        self._waiting = waiting
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ImageCache:
        try:
            _claim(self.folder)
            self._stack.enter_context(_turn(self.folder, self._waiting))
            self._shelves = [_Shelf(self.folder, preprocessing) for preprocessing in self._preprocessings.values()]
            for shelf in self._shelves:
                shelf.clear_away()
            self._size = sum(path.stat().st_size for path in self.folder.glob("*/[0-9]*.*"))
        except OSError as error:
            self._stack.close()
            raise _unusable(self.folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack, contextlib.suppress(OSError):  # the limit can wait for the next run
            self._make_room(0, required=False)

    def lacks(self, digests: Sequence[bytes]) -> list[int]:
        """Positions of the images that are not there in all preprocessings. The others are kept from eviction."""
        missing = []
        for position, digest in enumerate(digests):
            for shelf in self._shelves:
                if digest in shelf.rows:
                    shelf.used.add(shelf.rows[digest][0])
            if any(digest not in shelf.rows for shelf in self._shelves):
                missing.append(position)
        return missing

    def open(self, preprocessing: Preprocessing, digests: Sequence[bytes]) -> Pixels:
        """The images with these digests, all of which must have been added or found here."""
        pixels = open_pixels(self.folder, preprocessing, digests)
        if pixels is None:
            raise TrainingProblem(
                f"image cache {self.folder} loses images while they are read: check its disk, or set train.cache to "
                "another folder"
            )
        return pixels

    def add(self, paths: Sequence[str], images: ImageSource, *, workers: int) -> Iterator[list[bytes | Excluded]]:
        """Reads the images at `paths`, in threads, and keeps those that are new.

        Yields the SHA-256 of each file, or why its image cannot be used, in the order of the paths, some at a time;
        what was yielded is durable. Raises TrainingProblem where the images are more than the cache may hold or the
        disk has room for, ImagesUnavailable as the source does. Nothing that is there already is lost then.
        """
        bytes_of_one = sum(shelf.row_bytes for shelf in self._shelves)
        needed = len(paths) * bytes_of_one
        if needed > self.limit:
            raise TrainingProblem(
                f"{len(paths)} prepared images take {_gib(needed)}, more than the {_gib(self.limit)} of "
                f"train.cache_gib: raise it (image cache {self.folder}), lower image_size, or train on fewer images"
            )
        for shelf in self._shelves:
            shelf.shard_rows = max(1, max(SHARD_BYTES, needed // MAX_SHARDS) // shelf.row_bytes)
        size = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // bytes_of_one))
        ahead: deque[list[tuple[str, Future[_Read | Excluded]]]] = deque()
        pool = ThreadPoolExecutor(workers, "image")
        try:
            for start in range(0, len(paths), size):
                chunk = paths[start : start + size]
                ahead.append([(path, pool.submit(self._read, path, images)) for path in chunk])
                if len(ahead) > 1:  # one is written while the next is read
                    yield self._keep(ahead.popleft(), images)
            while ahead:
                yield self._keep(ahead.popleft(), images)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, path: str, images: ImageSource) -> _Read | Excluded:
        try:
            data = images.read(path)
            digest = hashlib.sha256(data).digest()
            shelves = [shelf for shelf in self._shelves if digest not in shelf.rows]
            if not shelves:
                return _Read(digest, {})
            image = images.decode(data, path)
            return _Read(digest, {shelf.key: shelf.preprocessing.prepare(image) for shelf in shelves})
        except ImageProblem as problem:
            return Excluded(path, str(problem))

    def _keep(self, chunk: list[tuple[str, Future[_Read | Excluded]]], images: ImageSource) -> list[bytes | Excluded]:
        results = [(path, future.result()) for path, future in chunk]
        self.lacks([result.digest for _, result in results if isinstance(result, _Read)])  # keeps those that are there
        read: list[_Read | Excluded] = []
        for path, result in results:
            # Evicted between its reading and now: then it was not decoded.
            again = isinstance(result, _Read) and any(
                result.digest not in shelf.rows and shelf.key not in result.pixels for shelf in self._shelves
            )
            read.append(self._read(path, images) if again else result)
        for shelf in self._shelves:
            new = {
                result.digest: result.pixels[shelf.key]
                for result in read
                if isinstance(result, _Read) and result.digest not in shelf.rows
            }
            if new:
                try:
                    self._make_room(len(new) * (shelf.row_bytes + _KEY.itemsize))
                    self._size += shelf.append(new)
                except OSError as error:
                    raise _unusable(self.folder, error) from error
        return [result if isinstance(result, Excluded) else result.digest for result in read]

    def _make_room(self, wanted: int, *, required: bool = True) -> None:
        """Evicts until `wanted` bytes more are within the limit."""
        if self._size + wanted <= self.limit:
            return
        own = {shelf.folder: shelf for shelf in self._shelves}
        shards = [_Shard(path.with_suffix("")) for path in self.folder.glob("*/[0-9]*.keys")]
        for shard in sorted(shards, key=lambda shard: shard.keys.stat().st_mtime):
            shelf = own.get(shard.name.parent)
            if shelf is None or int(shard.name.name) not in shelf.used:
                self._size -= shard.evict()
                if shelf is not None and not shard.keys.exists():
                    shelf.forget(int(shard.name.name))
            if self._size + wanted <= self.limit:
                return
        if required:
            raise TrainingProblem(
                f"image cache {self.folder} holds {_gib(self._size)} that running trainings use, and train.cache_gib "
                f"allows {_gib(self.limit)}: raise it, wait for the others, or set train.cache to another folder"
            )


@dataclass(frozen=True)
class _Read:
    digest: bytes
    pixels: dict[str, NDArray[Any]]
    """By the key of the preprocessing, where they were not in the cache."""


class _Shard:
    """Two files: pixels and keys."""

    def __init__(self, name: Path) -> None:
        self.name = name
        self.pixels = name.with_suffix(".u8")
        self.keys = name.with_suffix(".keys")
        self.count = 0

    def evict(self) -> int:
        """Removes it unless somebody reads it. Returns the bytes that became free."""
        with self.pixels.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            size = self.pixels.stat().st_size + self.keys.stat().st_size
            self.remove()
        return size

    def remove(self) -> None:
        self.keys.unlink(missing_ok=True)  # first: pixels without keys are nothing, keys without pixels a lie
        self.pixels.unlink(missing_ok=True)


class _Shelf:
    """The shards of one preprocessing, and where in them each image is."""

    def __init__(self, folder: Path, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.key = pixel_key(preprocessing)
        self.folder = folder / self.key
        self.shape = (3, *preprocessing.size)
        self.row_bytes = math.prod(self.shape) * np.dtype(preprocessing.dtype).itemsize
        self.shard_rows = 1
        self.shards: dict[int, _Shard] = {}
        self.rows: dict[bytes, tuple[int, int]] = {}  # digest -> shard, row
        self.used: set[int] = set()
        """Shards that hold images of this run."""
        for path in sorted(self.folder.glob("[0-9]*.keys")):
            shard = self.shards[int(path.stem)] = _Shard(path.with_suffix(""))
            keys = self._keys(shard)
            shard.count = len(keys)
            for row, digest in enumerate(keys["sha256"]):
                self.rows.setdefault(digest.tobytes(), (int(path.stem), row))

    def _keys(self, shard: _Shard) -> NDArray[np.void]:
        """The keys whose pixels are there; none where the first or last row's pixels are not what its key says."""
        try:
            with shard.pixels.open("rb") as pixels:
                data = shard.keys.read_bytes()
                count = min(len(data) // _KEY.itemsize, os.fstat(pixels.fileno()).st_size // self.row_bytes)
                keys = np.frombuffer(data, _KEY, count)
                for row in {0, count - 1} if count else ():
                    if (
                        zlib.crc32(os.pread(pixels.fileno(), self.row_bytes, row * self.row_bytes))
                        != keys["crc32"][row]
                    ):
                        return keys[:0]
        except FileNotFoundError:
            return np.empty(0, _KEY)
        return keys

    def clear_away(self) -> None:
        """Removes what a kill, damage or an unfinished eviction left. For the one process that fills the cache."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "preprocessing.json").exists():
            write_json(self.folder / "preprocessing.json", {"format": _FORMAT, **_pixel_fields(self.preprocessing)})
        for number, shard in list(self.shards.items()):
            if not shard.count:
                shard.remove()
                del self.shards[number]
        for path in self.folder.glob("[0-9]*.u8"):
            if int(path.stem) not in self.shards:
                path.unlink()

    def forget(self, number: int) -> None:
        """What is known of an evicted shard."""
        del self.shards[number]
        self.rows = {digest: place for digest, place in self.rows.items() if place[0] != number}

    def append(self, images: dict[bytes, NDArray[Any]]) -> int:
        """Writes images by their digests, durably. Returns the bytes written."""
        digests = list(images)
        while digests:
            number = max(self.shards, default=0)
            if not number or self.shards[number].count >= self.shard_rows:
                # Never a number again: who has read the keys of an evicted shard must not find other pixels under it.
                number = max(number + 1, time.time_ns())
                self.shards[number] = _Shard(self.folder / str(number))
            shard = self.shards[number]
            here, digests = digests[: self.shard_rows - shard.count], digests[self.shard_rows - shard.count :]
            self.used.add(number)
            keys = np.zeros(len(here), _KEY)
            keys["sha256"] = np.frombuffer(b"".join(here), np.uint8).reshape(-1, 32)
            keys["crc32"] = [zlib.crc32(images[digest].data) for digest in here]
            _append(shard.pixels, shard.count * self.row_bytes, [images[digest] for digest in here])
            _append(shard.keys, shard.count * _KEY.itemsize, [keys.view(np.uint8)])
            for row, digest in enumerate(here, shard.count):
                self.rows[digest] = number, row
            shard.count += len(here)
        return len(images) * (self.row_bytes + _KEY.itemsize)


def _append(path: Path, end: int, arrays: Sequence[NDArray[Any]]) -> None:
    """Writes after the first `end` bytes, and durably; what lay behind them is cut off. All of it or nothing."""
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        try:
            file.truncate(end)
            for array in arrays:
                rest = array.data.cast("B")
                while rest:  # a disk that fills up takes a part, and refuses the next
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    if new:
        sync_folder(path.parent)


def _claim(folder: Path) -> None:
    """Makes the folder an image cache, or checks that it is one: what it evicts must be its own."""
    mark = folder / "cache.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith((".lock", "cache.json")))
        if others:
            raise TrainingProblem(
                f"{folder} is no image cache: it holds {others[0]!r}; set train.cache to a new or empty folder"
            )
        write_json(mark, {"format": _FORMAT, "what": "prepared images, made again when they are missing"})
    try:
        known = json.loads(mark.read_text())["format"] == _FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise TrainingProblem(
            f"{mark} is not of this version's image cache: remove the folder, or set train.cache to another one"
        )


@contextlib.contextmanager
def _turn(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    warned = False
    while True:
        try:
            # Two runs of the same images would read them twice if the second did not wait.
            lock.acquire(timeout=LOCK_POLL_SECONDS)
            break
        except Timeout:
            if not warned:
                log.warning("another process fills the image cache %s: waiting for it", folder)
            warned = True
            waiting()
    try:
        yield
    finally:
        lock.release()


def _unusable(folder: Path, error: OSError) -> TrainingProblem:
    return TrainingProblem(
        f"image cache {folder} cannot be used: {error.strerror or error}; make room or correct its permissions, or set "
        "train.cache to another disk, and train again: images that are in it stay"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
