"""What is trained on: paths and labels, from a table or from elsewhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from migrator.trainer.data.tables import Header, Table, read_table
from migrator.trainer.errors import ImageProblem, TableProblem, TrainingProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from migrator.trainer.images.source import ImageSource


@dataclass(frozen=True)
class Skipped:
    """Files of an image folder that are no training images, and why."""

    count: int
    reason: str
    example: str

    def __str__(self) -> str:
        return f"{self.count} {self.reason} (such as {self.example!r})"


@dataclass(frozen=True)
class TrainingItems:
    """Images: paths as `ImageSource.load` takes them, and a label for each or none at all. See `training_items`."""

    paths: tuple[str, ...]
    labels: tuple[str, ...] | None
    skipped: tuple[Skipped, ...] = ()
    """What `folder_items` found besides."""
    unlabelled: str = field(default="", compare=False)
    """Why there are no labels, for a message."""

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


def training_items(
    paths: Sequence[str],
    labels: Sequence[str] | None,
    *,
    source: str,
    place: Callable[[int], str] = lambda row: f"row {row + 1}",
) -> TrainingItems:
    """Checks paths and labels (None: there are none), row by row. For messages: `source`, and the `place` of a row.

    A path given twice with one label counts once. Raises TrainingProblem when a path has two labels, there are no rows,
    or there is only one class.
    """
    if not len(paths):
        needed = "a path" if labels is None else "a path and a label"
        raise TrainingProblem(f"{source} lists no images: add rows with {needed}")
    if labels is None:
        return TrainingItems(tuple(dict.fromkeys(paths)), None)
    first: dict[str, int] = {}
    for row, (path, label) in enumerate(zip(paths, labels, strict=True)):
        earlier = first.setdefault(path, row)
        if labels[earlier] != label:
            other = f"{place(earlier)} as {labels[earlier]!r}"
            raise TrainingProblem(f"{source}: {place(row)} labels {path!r} as {label!r}, {other}: keep one")
    unique = {path: labels[row] for path, row in first.items()}
    if len(set(unique.values())) == 1:
        raise TrainingProblem(
            f"{source}: every image has the label {labels[0]!r}: training needs images of at least two classes"
        )
    return TrainingItems(tuple(unique), tuple(unique.values()))


def read_items(file: Path, images: ImageSource | None = None, *, need_labels: bool = True) -> TrainingItems:
    """Reads columns `path` and `label` of a .csv (UTF-8, with a header) or .parquet file; others are ignored.

    With `images` each path gets the spelling that `ImageSource.below_root` gives it. Without `need_labels` a file may
    lack the column `label`: its items have no labels then. Raises TrainingProblem when the file cannot be read, or its
    rows cannot be used.
    """

    def choose(header: Header) -> list[str]:
        advice = "the first line names the columns path and label"
        absent = [name for name in ("path", "label") if name not in header]
        if "path" in absent or (absent and need_labels):
            raise header.missing([name for name in absent if need_labels or name == "path"], advice)
        if absent and (near := header.near("label")) is not None:
            raise TableProblem(
                f"{file} has no column label (it has: {header.seen}): did you mean {near[1]!r}? Rename it to label, "
                "or give it another name to train without labels"
            )
        return [name for name in ("path", "label") if name in header]

    try:
        table = read_table(file, choose, what="training images", key="train.items")
        paths = table.texts("path", list_advice=": write one path")
        labels = None
        if "label" in table.columns:
            labels = table.texts("label", list_advice=": training needs one class for each image: write one value")
    except TableProblem as problem:
        raise TrainingProblem(str(problem)) from problem
    if images is not None:
        paths = _below_root(paths, images, table)
    items = training_items(paths, labels, source=str(file), place=table.place)
    missing = f"{file} has no column label (it has: {table.header.seen})"
    return items if labels is not None else replace(items, unlabelled=missing)


def _below_root(paths: Sequence[str], images: ImageSource, table: Table) -> list[str]:
    """The paths in the one spelling of the root. Those that no root could have are refused when they are read."""
    found = []
    for row, path in enumerate(paths):
        try:
            found.append(images.below_root(path))
        except ImageProblem as problem:
            raise TrainingProblem(f"{table.file}: {table.place(row)}: {problem}: correct or remove it") from problem
    return found


@dataclass(frozen=True)
class Excluded:
    """An image that could not be used, and why."""

    path: str
    reason: str
