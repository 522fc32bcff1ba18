"""Training images in folders that name their classes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from migrator.trainer.data.items import Skipped, TrainingItems, training_items
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.images.paths import is_safe
from migrator.trainer.images.source import image_suffixes


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
