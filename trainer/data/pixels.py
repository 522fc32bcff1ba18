"""Prepared images as training reads them: memory maps of an image cache's shards."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.trainer.data.shards import Shelf, unusable_cache

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.images.preprocessing import Preprocessing


class Pixels:
    """Prepared images as memory maps of the shards that hold them, in the order in which they were requested.

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

    Takes no lock, so that it works beside a process that fills the cache. Raises TrainingProblem for a folder that
    cannot be read.
    """
    try:
        shelf = Shelf(folder, preprocessing)
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
        raise unusable_cache(folder, error) from error
    return Pixels(preprocessing, shards, places)
