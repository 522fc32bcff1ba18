"""Training images: the list of items, the held-out split, the prepared pixels, and augmentation."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ImageProblem, TrainingProblem

if TYPE_CHECKING:
    import PIL.Image
    import torch

    from trainer.images import ImageSource

FEWEST_TO_HOLD_OUT = 3
"""A class with fewer images stays in training whole."""

LOADED_TOGETHER = 256


@dataclass(frozen=True)
class TrainingItems:
    """Labelled images: paths as `ImageSource.load` takes them, and a label for each. Made by `training_items`."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> list[str]:
        """The distinct labels, sorted: a class index is a position in this list."""
        return sorted(set(self.labels))

    @property
    def digest(self) -> str:
        """SHA-256 over paths and labels in order, in hex."""
        return hashlib.sha256(json.dumps([self.paths, self.labels]).encode()).hexdigest()


def training_items(paths: Sequence[Any], labels: Sequence[Any], *, source: str) -> TrainingItems:
    """Checks a table of paths and labels, row by row; `source` names it in messages.

    Numbers are taken as labels by their text. A path given twice with one label counts once. Raises TrainingProblem
    when a path or label is missing, a path has two labels, there are no rows, or there is only one class.
    """
    rows = [(_text(path), _text(label)) for path, label in zip(paths, labels, strict=True)]
    if not rows:
        raise TrainingProblem(f"{source} lists no images: add rows with a path and a label")
    for column, name in enumerate(("path", "label")):
        missing = [number for number, row in enumerate(rows, start=1) if not row[column]]
        if missing:
            raise TrainingProblem(
                f"{source}: {name} missing in {len(missing)} of {len(rows)} rows (first: row {missing[0]}): "
                "fill it in or remove these rows"
            )
    unique: dict[str, str] = {}
    for number, (path, label) in enumerate(rows, start=1):
        if unique.setdefault(path, label) != label:
            raise TrainingProblem(
                f"{source}: row {number} labels {path!r} as {label!r}, an earlier row as {unique[path]!r}: keep one"
            )
    if len(set(unique.values())) == 1:
        raise TrainingProblem(
            f"{source}: every image has the label {rows[0][1]!r}: training needs images of at least two classes"
        )
    return TrainingItems(tuple(unique), tuple(unique.values()))


def _text(value: Any) -> str:
    if value is None or value != value:  # a missing number is NaN, the only value that differs from itself
        return ""
    return str(value).strip()


def read_items(file: Path) -> TrainingItems:
    """Reads columns `path` and `label` of a .csv (UTF-8, with a header) or .parquet file; others are ignored.

    Raises TrainingProblem when the file cannot be read or `training_items` refuses its rows.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix.lower() not in readers:
        raise TrainingProblem(f"{file}: training items are read from a .csv or .parquet file: rename or convert it")
    try:
        paths, labels = readers[file.suffix.lower()](file)
    except FileNotFoundError:
        raise TrainingProblem(f"{file}: no such file: set train.items to the list of training images") from None
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise TrainingProblem(f"{file} cannot be read: {_one_line(error)}") from error
    return training_items(paths, labels, source=str(file))


def _read_csv(file: Path) -> tuple[list[Any], list[Any]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, strict=True)
        _need_columns(file, table.fieldnames or [])
        rows = list(table)
    return [row["path"] for row in rows], [row["label"] for row in rows]


def _read_parquet(file: Path) -> tuple[list[Any], list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            _need_columns(file, table.schema_arrow.names)
            columns = table.read(columns=["path", "label"])
    except pyarrow.ArrowException as error:
        raise TrainingProblem(f"{file} is not a readable Parquet file: {_one_line(error)}") from error
    return columns["path"].to_pylist(), columns["label"].to_pylist()


def _need_columns(file: Path, names: Sequence[str]) -> None:
    missing = [name for name in ("path", "label") if name not in names]
    if missing:
        raise TrainingProblem(
            f"{file} has no column {' and no column '.join(missing)} (it has: {', '.join(names) or 'none'}): "
            "the first line names the columns path and label"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def held_out_split(
    labels: NDArray[np.int64], share: float, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers (ascending) for training and for validation, with about `share` of every class held out.

    A class's expected number of held-out images is exact also where it is a fraction. Classes of fewer than three
    images stay in training, and at least two of every other do. Raises TrainingProblem where nothing can be held out.
    """
    if share == 0:
        return np.arange(len(labels)), np.empty(0, np.int64)
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        wanted = int(len(rows) * share + random.random())
        if len(rows) >= FEWEST_TO_HOLD_OUT:
            held_out[random.permutation(rows)[: min(wanted, len(rows) - 2)]] = True
    if not held_out.any():
        raise TrainingProblem(
            f"of {len(labels)} images none can be held out for validation: give more images of each class, "
            "or set validation to 0"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """A batch of images ready for encoders, and those of it that could not be used."""

    rows: list[int]  # (b,) positions of the usable images in the list of paths
    arrays: list[NDArray[np.uint8]]  # for each `prepare` (b, 3, S, S)
    left_out: list[LeftOut]


def prepared_batches(
    paths: Sequence[str],
    images: ImageSource,
    prepares: Sequence[Callable[[PIL.Image.Image], NDArray[np.uint8]]],
    *,
    workers: int,
) -> Iterator[Prepared]:
    """Every image in order, loaded once and prepared for each encoder in a pool of threads.

    Raises ImagesUnavailable as the source does.
    """

    def load(path: str) -> list[NDArray[np.uint8]] | LeftOut:
        try:
            image = images.load(path)
        except ImageProblem as problem:
            return LeftOut(path, str(problem))
        return [prepare(image) for prepare in prepares]

    with ThreadPoolExecutor(max_workers=workers) as pool:
        for start in range(0, len(paths), LOADED_TOGETHER):
            results = list(pool.map(load, paths[start : start + LOADED_TOGETHER]))
            usable = [(row, result) for row, result in enumerate(results, start) if not isinstance(result, LeftOut)]
            yield Prepared(
                rows=[row for row, _ in usable],
                arrays=[np.stack([arrays[i] for _, arrays in usable]) for i in range(len(prepares)) if usable],
                left_out=[result for result in results if isinstance(result, LeftOut)],
            )


def augment(batch: torch.Tensor, *, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Shifts each image at random by up to an eighth of its side, edges repeated, and mirrors half of them if `flip`.

    Takes and gives (B, 3, S, S) of any type, on any device; `generator` is a CPU generator.
    """
    import torch

    count, _, _, side = batch.shape
    reach = side // 8
    axis = torch.arange(side)
    shift = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows, columns = (axis + shift).clamp(0, side - 1)  # (B, S) each; clamping repeats the edge
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    device = batch.device
    sample = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(3, device=device)[None, :, None, None]
    return batch[sample, channel, rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]]
