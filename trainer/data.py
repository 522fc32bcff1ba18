"""What is trained on: the list of items, the held-out split, the order of an epoch, and its batches."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from migrator.trainer.errors import ImageProblem, TableProblem, TrainingProblem
from migrator.trainer.image_roots import is_safe
from migrator.trainer.images import image_suffixes
from migrator.trainer.tables import Header, Table, read_table

if TYPE_CHECKING:
    import torch

    from migrator.trainer.images import ImageSource

MIN_TO_HOLD_OUT = 3
"""All images of a smaller class stay in training."""

T = TypeVar("T")


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


def folder_items(root: Path) -> TrainingItems:
    """The images in the folders of `root`, labelled by them: `shoes/a/1.jpg` is of class `shoes`. Sorted by path.

    Images are known by their suffix. Links to folders below `root` are followed; a folder that is reached twice counts
    once, by its own name. Whatever else lies there is counted in `skipped`. Raises TrainingProblem where `root` cannot
    be read or `training_items` refuses what is there.
    """
    walk = _FolderWalk(root)
    walk.run()
    if not walk.paths and walk.skipped:
        found = "; ".join(map(str, walk.listed()))
        raise TrainingProblem(
            f"image folder {root} has no images in folders, only {found}: put the images of each class into a folder"
        )
    paths = sorted(walk.paths)
    items = training_items(paths, [path.split("/", 1)[0] for path in paths], source=f"image folder {root}")
    return replace(items, skipped=walk.listed())


class _FolderWalk:
    """Walks an image root: real folders first, then those that are reached by links only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: list[str] = []
        self.skipped: dict[str, tuple[int, str]] = {}  # reason -> count, an example
        self._top = os.path.realpath(root)
        self._seen: set[str] = set()
        self._links: list[str] = []
        self._suffixes = image_suffixes()

    def run(self) -> None:
        self._walk(str(self.root))
        while self._links:  # a linked folder may hold further links
            link = self._links.pop(0)
            target = os.path.realpath(link)
            if not self._inside(target):
                self._skip("links to folders outside the root", self._below(link))
            elif target in self._seen:
                self._skip("links to folders that are read already", self._below(link))
            else:
                self._walk(link)

    def _walk(self, start: str) -> None:
        for folder, folders, files in os.walk(start, onerror=self._unreadable):
            real = os.path.realpath(folder)
            if real in self._seen:
                folders.clear()
                continue
            self._seen.add(real)
            for name in sorted(folders):
                whole = os.path.join(folder, name)  # noqa: PTH118
                if name.startswith("."):
                    self._skip("hidden files and folders", self._below(whole))
                elif os.path.islink(whole):  # noqa: PTH114
                    self._links.append(whole)
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                self._take(self._below(os.path.join(folder, name)), name)  # noqa: PTH118

    def _take(self, path: str, name: str) -> None:
        reason = self._why_not(path, name)
        if reason is None:
            self.paths.append(path)
        else:
            self._skip(reason, path)

    def _why_not(self, path: str, name: str) -> str | None:
        if name.startswith("."):
            return "hidden files and folders"
        if Path(name).suffix.lower() not in self._suffixes:
            return "files without the suffix of an image"
        if "/" not in path:
            return "images beside the folders, which have no class"
        label = path.split("/", 1)[0]
        # Labels and paths are text for people and files, where spaces at the ends do not count.
        if not is_safe(path) or path != path.strip() or label != label.strip():
            return "names that are not trusted"
        whole = self.root / path
        if whole.is_symlink() and not (whole.exists() and self._inside(os.path.realpath(whole))):
            return "links to files that are not below the root"
        return None

    def _inside(self, target: str) -> bool:
        return f"{target}/".startswith(f"{self._top.rstrip('/')}/")

    def _below(self, whole: str) -> str:
        return os.path.relpath(whole, self.root)

    def _skip(self, reason: str, path: str) -> None:
        count, example = self.skipped.get(reason, (0, path))
        self.skipped[reason] = count + 1, min(example, path)

    def listed(self) -> tuple[Skipped, ...]:
        return tuple(Skipped(count, reason, example) for reason, (count, example) in sorted(self.skipped.items()))

    def _unreadable(self, error: OSError) -> None:
        raise TrainingProblem(
            f"image folder {self.root} cannot be walked: {error.strerror or error} ({error.filename!r}): correct "
            "images.root or the permissions below it"
        ) from error


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
        if len(rows) >= MIN_TO_HOLD_OUT:
            held_out[random.permutation(rows)[: min(wanted, len(rows) - 2)]] = True
    if not held_out.any():
        raise TrainingProblem(
            f"of {len(labels)} images none can be held out for validation: give more images of each class, "
            "or set train.validation to 0"
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
class Excluded:
    """An image that could not be used, and why."""

    path: str
    reason: str
