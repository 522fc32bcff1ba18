"""Prepared images on disk, so that no image is decoded and resized twice: shared by runs, kept across kills.

An image is found by the SHA-256 of its file and by the preprocessing that made its pixels, whatever its path or label.
For each preprocessing there is a folder with shards of two files: `<number>.u8` with pixels (rows, 3, H, W) and
`<number>.keys` with a row for each: the SHA-256 and the CRC-32 of the pixels. Pixels are durable before their keys are
written, so a row that has a key is whole, and what a kill left behind it is cut off.

Everything here can be made again from the images. So a damaged shard is thrown away rather than complained about.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from migrator.trainer.data.items import Excluded
from migrator.trainer.data.pixels import Pixels, open_pixels
from migrator.trainer.data.shards import FORMAT, KEY, Shard, Shelf, pixel_key, unusable_cache
from migrator.trainer.errors import ImageProblem, TrainingProblem
from migrator.trainer.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.images.source import ImageSource


SHARD_BYTES = 2**28
MAX_SHARDS = 256
"""Large runs get larger shards: each one that is read costs one of the 1,024 files that a process may have open."""
CHUNK_BYTES = 2**25
CHUNK_IMAGES = 256
LOCK_POLL_SECONDS = 1.0
log = logging.getLogger(__name__)


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
            self._shelves = [Shelf(self.folder, preprocessing) for preprocessing in self._preprocessings.values()]
            for shelf in self._shelves:
                shelf.clear_away()
            self._size = sum(path.stat().st_size for path in self.folder.glob("*/[0-9]*.*"))
        except OSError as error:
            self._stack.close()
            raise unusable_cache(self.folder, error) from error
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
                    self._make_room(len(new) * (shelf.row_bytes + KEY.itemsize))
                    self._size += shelf.append(new)
                except OSError as error:
                    raise unusable_cache(self.folder, error) from error
        return [result if isinstance(result, Excluded) else result.digest for result in read]

    def _make_room(self, wanted: int, *, required: bool = True) -> None:
        """Evicts until `wanted` bytes more are within the limit."""
        if self._size + wanted <= self.limit:
            return
        own = {shelf.folder: shelf for shelf in self._shelves}
        shards = [Shard(path.with_suffix("")) for path in self.folder.glob("*/[0-9]*.keys")]
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
        write_json(mark, {"format": FORMAT, "what": "prepared images, made again when they are missing"})
    try:
        known = json.loads(mark.read_text())["format"] == FORMAT
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


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
