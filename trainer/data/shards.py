"""The files of an image cache: shards of pixels with their keys, in a folder for each preprocessing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.trainer.errors import TrainingProblem
from migrator.trainer.files import sync_folder, write_json
from migrator.trainer.images.preprocessing import fingerprint_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.images.preprocessing import Preprocessing


KEY = np.dtype([("sha256", np.uint8, 32), ("crc32", "<u4")])
FORMAT = 1


def pixel_key(preprocessing: Preprocessing) -> str:
    """Names everything that decides an image's pixels, which mean and deviation do not: they are applied per batch."""
    return hashlib.sha256(json.dumps(_pixel_fields(preprocessing), sort_keys=True).encode()).hexdigest()[:16]


def _pixel_fields(preprocessing: Preprocessing) -> dict[str, object]:
    fields = preprocessing.declared()
    del fields["std"]
    if preprocessing.resize != "border":  # which pads with the mean colour
        del fields["mean"]
    if preprocessing.transform is not None:  # the code behind its name may have changed
        fields["output"] = hashlib.sha256(preprocessing.prepare(fingerprint_image()).tobytes()).hexdigest()
    return fields


class Shard:
    """Two files: pixels and keys."""

    def __init__(self, name: Path) -> None:
        self.name = name
        self.pixels = name.with_suffix(".u8")
        self.keys = name.with_suffix(".keys")
        self.count = 0

    def evict(self) -> int:
        """Removes it unless a process reads it. Returns the bytes freed."""
        with self.pixels.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            size = self.pixels.stat().st_size + self.keys.stat().st_size
            self.remove()
        return size

    def remove(self) -> None:
        """Removes both files."""
        self.keys.unlink(missing_ok=True)  # first: pixels without keys are nothing, keys without pixels a lie
        self.pixels.unlink(missing_ok=True)


class Shelf:
    """The shards of one preprocessing, and where in them each image is."""

    def __init__(self, folder: Path, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.key = pixel_key(preprocessing)
        self.folder = folder / self.key
        self.shape = (3, *preprocessing.size)
        self.row_bytes = math.prod(self.shape) * np.dtype(preprocessing.dtype).itemsize
        self.shard_rows = 1
        self.shards: dict[int, Shard] = {}
        self.rows: dict[bytes, tuple[int, int]] = {}  # digest -> shard, row
        self.used: set[int] = set()
        """Shards that hold images of this run."""
        for path in sorted(self.folder.glob("[0-9]*.keys")):
            shard = self.shards[int(path.stem)] = Shard(path.with_suffix(""))
            keys = self._keys(shard)
            shard.count = len(keys)
            for row, digest in enumerate(keys["sha256"]):
                self.rows.setdefault(digest.tobytes(), (int(path.stem), row))

    def _keys(self, shard: Shard) -> NDArray[np.void]:
        """The keys whose pixels are there; none where the first or last row's pixels do not match its key."""
        try:
            with shard.pixels.open("rb") as pixels:
                data = shard.keys.read_bytes()
                count = min(len(data) // KEY.itemsize, os.fstat(pixels.fileno()).st_size // self.row_bytes)
                keys = np.frombuffer(data, KEY, count)
                for row in {0, count - 1} if count else ():
                    if (
                        zlib.crc32(os.pread(pixels.fileno(), self.row_bytes, row * self.row_bytes))
                        != keys["crc32"][row]
                    ):
                        return keys[:0]
        except FileNotFoundError:
            return np.empty(0, KEY)
        return keys

    def clear_away(self) -> None:
        """Removes what a kill, damage or an unfinished eviction left. For the one process that fills the cache."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "preprocessing.json").exists():
            write_json(self.folder / "preprocessing.json", {"format": FORMAT, **_pixel_fields(self.preprocessing)})
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
                self.shards[number] = Shard(self.folder / str(number))
            shard = self.shards[number]
            here, digests = digests[: self.shard_rows - shard.count], digests[self.shard_rows - shard.count :]
            self.used.add(number)
            keys = np.zeros(len(here), KEY)
            keys["sha256"] = np.frombuffer(b"".join(here), np.uint8).reshape(-1, 32)
            keys["crc32"] = [zlib.crc32(images[digest].data) for digest in here]
            _append(shard.pixels, shard.count * self.row_bytes, [images[digest] for digest in here])
            _append(shard.keys, shard.count * KEY.itemsize, [keys.view(np.uint8)])
            for row, digest in enumerate(here, shard.count):
                self.rows[digest] = number, row
            shard.count += len(here)
        return len(images) * (self.row_bytes + KEY.itemsize)


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


def unusable_cache(folder: Path, error: OSError) -> TrainingProblem:
    """The problem that a cache cannot be read or written, and what to do."""
    return TrainingProblem(
        f"image cache {folder} cannot be used: {error.strerror or error}; make room or correct its permissions, or set "
        "train.cache to another disk, and train again: images that are in it stay"
    )
