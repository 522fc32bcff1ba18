"""The exact vectors that an index was built from: `.npy` files beside it, in the order of the items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import StoreRejected, Vectors
from migrator.adapters.faiss.items import listed
from migrator.adapters.files import translated

SAMPLE = 256
"""Vectors that are compared with those of the index, to find files in another order."""
FITS = 0.75
"""The share of them that must lie nearer to their own vector in the index than to another one's: of vectors in another
order it is one half."""
MIN_SAMPLE = 8
"""Below this many nothing is concluded."""


@dataclass(frozen=True, slots=True)
class Original:
    """One file: (count, dim) float16 or float32, mapped into memory."""

    path: Path
    array: NDArray[np.float32]

    def write(self, vectors: Vectors, file: IO[bytes]) -> None:
        """Writes other vectors in the way of this file."""
        np.save(file, vectors.astype(self.array.dtype))


class Originals:
    """The rows of all files."""

    def __init__(self, files: Sequence[Original]) -> None:
        self.files = files
        self._first = np.cumsum([0, *(len(file.array) for file in files)])

    def __str__(self) -> str:
        first, last = self.files[0].path, self.files[-1].path
        return str(first) if len(self.files) == 1 else f"{first} to {last} ({len(self.files)} files)"

    @property
    def count(self) -> int:
        """Number of vectors."""
        return int(self._first[-1])

    @property
    def dim(self) -> int:
        """Their length."""
        return int(self.files[0].array.shape[1])

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """(m,) row numbers -> (m, dim) float32, a copy."""
        found = np.empty((len(rows), self.dim), np.float32)
        of_file = np.searchsorted(self._first, rows, side="right") - 1
        for number in np.unique(of_file).tolist():
            here = of_file == number
            found[here] = self.files[number].array[rows[here] - self._first[number]]
        return found


def read_originals(files: Sequence[Path], live: Callable[[Path], Path]) -> Originals:
    """The vectors of these files. Raises `StoreRejected` with everything that is wrong."""
    problems: list[str] = []
    found: list[Original] = []
    for path in files:
        try:
            found.append(Original(path, _mapped(path, live(path))))
        except StoreRejected as error:
            problems.append(str(error))
    widths = {file.array.shape[1]: file.path for file in found}
    if len(widths) > 1:
        problems.append(
            "the vectors differ in length: "
            + ", ".join(f"{width} in {path}" for width, path in widths.items())
            + ": name the files of one encoder"
        )
    if problems:
        raise StoreRejected(listed(problems))
    return Originals(found)


def _mapped(path: Path, place: Path) -> NDArray[np.float32]:
    with translated(path):
        try:
            array = np.load(place, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StoreRejected(f"{path} cannot be read as .npy: truncated or not one ({reason})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype not in (np.float16, np.float32):
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise StoreRejected(
            f"{path} must hold vectors as float16 or float32 of shape (n, dim), it is {what}: "
            "save it so with numpy.save"
        )
    return array
