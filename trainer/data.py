"""What is trained on: the list of items, the held-out split, the order of an epoch, and its batches."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.errors import TrainingProblem
from trainer.image_roots import is_safe
from trainer.images import SUFFIXES

if TYPE_CHECKING:
    import torch

FEWEST_TO_HOLD_OUT = 3
"""A class with fewer images stays in training whole."""

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingItems:
    """Images: paths as `ImageSource.load` takes them, and a label for each or none at all. See `training_items`."""

    paths: tuple[str, ...]
    labels: tuple[str, ...] | None
    passed_over: int = 0
    """Files whose names `folder_items` did not trust."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> list[str]:
        """The distinct labels, sorted: a class index is a position in this list. Empty where there are no labels."""
        return sorted(set(self.labels or ()))

    @property
    def digest(self) -> str:
        """SHA-256 over paths and labels in order, in hex."""
        return hashlib.sha256(json.dumps([self.paths, self.labels]).encode()).hexdigest()


def training_items(paths: Sequence[Any], labels: Sequence[Any] | None, *, source: str) -> TrainingItems:
    """Checks a table of paths and labels (None: there are none), row by row; `source` names it in messages.

    Numbers are taken as labels by their text. A path given twice with one label counts once. Raises TrainingProblem
    when a path or label is missing, a path has two labels, there are no rows, or there is only one class.
    """
    if not len(paths):
        needed = "a path" if labels is None else "a path and a label"
        raise TrainingProblem(f"{source} lists no images: add rows with {needed}")
    names = _column(paths, "path", source)
    if labels is None:
        return TrainingItems(tuple(dict.fromkeys(names)), None)
    rows = list(zip(names, _column(labels, "label", source), strict=True))
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


def _column(values: Sequence[Any], name: str, source: str) -> list[str]:
    column = [_text(value) for value in values]
    missing = [number for number, text in enumerate(column, start=1) if not text]
    if missing:
        raise TrainingProblem(
            f"{source}: {name} missing in {len(missing)} of {len(column)} rows (first: row {missing[0]}): "
            "fill it in or remove these rows"
        )
    return column


def _text(value: Any) -> str:
    if value is None or value != value:  # a missing number is NaN, the only value that differs from itself
        return ""
    return str(value).strip()


def read_items(file: Path, *, need_labels: bool = True) -> TrainingItems:
    """Reads columns `path` and `label` of a .csv (UTF-8, with a header) or .parquet file; others are ignored.

    Without `need_labels` a file may lack the column `label`: its items have no labels then. Raises TrainingProblem when
    the file cannot be read or `training_items` refuses its rows.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix.lower() not in readers:
        raise TrainingProblem(f"{file}: training items are read from a .csv or .parquet file: rename or convert it")
    try:
        columns = readers[file.suffix.lower()](file, need_labels)
    except FileNotFoundError:
        raise TrainingProblem(f"{file}: no such file: set train.items to the list of training images") from None
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise TrainingProblem(f"{file} cannot be read: {_one_line(error)}") from error
    return training_items(columns["path"], columns.get("label"), source=str(file))


def _read_csv(file: Path, need_labels: bool) -> dict[str, list[Any]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, strict=True)
        names = _columns(file, table.fieldnames or [], need_labels)
        rows = list(table)
    return {name: [row[name] for row in rows] for name in names}


def _read_parquet(file: Path, need_labels: bool) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            names = _columns(file, table.schema_arrow.names, need_labels)
            columns = table.read(columns=names)
    except pyarrow.ArrowException as error:
        raise TrainingProblem(f"{file} is not a readable Parquet file: {_one_line(error)}") from error
    return {name: columns[name].to_pylist() for name in names}


def _columns(file: Path, names: Sequence[str], need_labels: bool) -> list[str]:
    """Those to read. Raises TrainingProblem where one is needed that is not there."""
    missing = [name for name in (("path", "label") if need_labels else ("path",)) if name not in names]
    if missing:
        raise TrainingProblem(
            f"{file} has no column {' and no column '.join(missing)} (it has: {', '.join(names) or 'none'}): "
            "the first line names the columns path and label"
        )
    return [name for name in ("path", "label") if name in names]


def folder_items(root: Path) -> TrainingItems:
    """The images in the folders of `root`, labelled by them: `shoes/a/1.jpg` is of class `shoes`. Sorted by path.

    Images are told by their suffix. Hidden files and folders, links to folders and files beside the folders, which have
    no class, are not looked at. Files whose names `ImageSource` would refuse are counted in `passed_over`. Raises
    TrainingProblem where `root` cannot be read or `training_items` refuses what is there.
    """

    def unreadable(error: OSError) -> None:
        raise TrainingProblem(
            f"image folder {root} cannot be walked: {error.strerror or error} ({error.filename!r}): correct "
            "images.root or the permissions below it"
        ) from error

    paths: list[str] = []
    passed_over = 0
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for name in files if below != os.curdir else ():
            path = f"{below}/{name}"
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            # A label is text for people and files; `_text` would strip the spaces of these.
            if is_safe(path) and path == path.strip() and below == below.strip():
                paths.append(path)
            else:
                passed_over += 1
    paths.sort()
    items = training_items(paths, [path.split("/", 1)[0] for path in paths], source=f"image folder {root}")
    return replace(items, passed_over=passed_over)


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


def epoch_rows(
    train: NDArray[np.int64], labels: NDArray[np.int64], *, balanced: bool, generator: torch.Generator
) -> NDArray[np.int64]:
    """The rows of an epoch in the order in which they are trained on, as many as `train` has.

    Plain: every row once. `balanced`: at each place the class is drawn first, all alike, then one of its images that
    was not drawn since the class was last used up. `labels` (n,) is looked up by row; `generator` is a CPU generator
    and decides alone.
    """
    import torch

    if not balanced:
        return train[torch.randperm(len(train), generator=generator).numpy()]
    classes, members = np.unique(labels[train], return_inverse=True)
    sizes = np.bincount(members)
    drawn = torch.randint(len(classes), (len(train),), generator=generator).numpy()
    wanted = np.bincount(drawn, minlength=len(classes))
    # Each class's images as often as it takes to fill its places, every repetition shuffled for itself.
    rounds = -(-wanted // sizes)
    image = np.repeat(np.arange(len(train)), rounds[members])
    first = np.cumsum(rounds[members]) - rounds[members]
    number = np.arange(len(image)) - np.repeat(first, rounds[members])
    shuffle = torch.rand(len(image), generator=generator, dtype=torch.float64).numpy()
    image = image[np.lexsort((shuffle, number, members[image]))]
    start = np.cumsum(rounds * sizes) - rounds * sizes
    places = np.argsort(drawn, kind="stable")
    rank = np.arange(len(train)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    rows = np.empty_like(train)
    rows[places] = train[image[np.repeat(start, wanted) + rank]]
    return rows


def batches_ahead(make: Callable[[int], T], count: int) -> Generator[T, None, None]:
    """`make(0)` to `make(count - 1)`, in this order; a thread makes the next one while the last one is in use.

    What `make` raises comes out in its place. Closing the iterator early waits for the batch in the making.
    """
    with ThreadPoolExecutor(1, "batch") as pool:
        following = pool.submit(make, 0) if count else None
        for number in range(1, count + 1):
            assert following is not None
            batch = following.result()
            following = pool.submit(make, number) if number < count else None
            yield batch


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be used, and why."""

    path: str
    reason: str
