"""What a training reads: pixels from the image cache, labels, the old side's vectors, and which images are held out.

The run folder notes them in `inputs.json` (which images are used, and what their files held), `old_vectors.npy`, and
for mirrored views `old_vectors_mirrored.npy`. A run that continues after a kill takes them from there, reads again only
the images that the cache has lost, and refuses those that have changed. Old vectors are written as they come: the next
run continues after the last whole batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from migrator.trainer.data.batches import batches_ahead, held_out_split
from migrator.trainer.data.cache import ImageCache
from migrator.trainer.data.items import Excluded, TrainingItems
from migrator.trainer.data.pixels import Pixels, open_pixels
from migrator.trainer.data.shards import pixel_key
from migrator.trainer.encoders.encoder import Encoder
from migrator.trainer.errors import EncoderProblem, TrainingProblem
from migrator.trainer.files import write_json
from migrator.trainer.old_space import StoredVectors
from migrator.trainer.training.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.images.preprocessing import Preprocessing
    from migrator.trainer.images.source import ImageSource
    from migrator.trainer.training.settings import FitSettings

QUERY_LIMIT, GALLERY_LIMIT = 2_000, 20_000
"""Most held-out queries and gallery images that validation compares."""

Report = Callable[[Literal["images", "old vectors"], int, int, float], None]
"""Stage, done, of how many, images per second."""


@dataclass(frozen=True)
class Inputs:
    """What training reads, in rows of usable images."""

    pixels: Pixels  # n images of (3, H, W)
    digests: list[bytes]  # n, SHA-256 of the images' files
    labels: NDArray[np.int64]  # (n,) in 0..classes-1
    classes: int
    class_names: list[str]
    old: NDArray[np.float32] | None  # (n, D) unit length
    old_flipped: NDArray[np.float32] | None
    """The same of the mirrored images, where images are mirrored in training and the old encoder is there."""
    excluded: list[Excluded]
    train: NDArray[np.int64]  # rows
    queries: NDArray[np.int64]  # rows held out
    gallery: NDArray[np.int64]  # rows of `train`


@dataclass(frozen=True)
class _Noted:
    """The content of `inputs.json`."""

    rows: list[int]  # of the items
    digests: list[bytes]
    excluded: list[Excluded]
    pseudo_classes: list[int] | None = None

    def write(self, file: Path) -> None:
        document = {
            "format": 2,
            "rows": self.rows,
            "sha256": [digest.hex() for digest in self.digests],
            "excluded": [asdict(entry) for entry in self.excluded],
            "pseudo_classes": self.pseudo_classes,
        }
        write_json(file, document)

    @classmethod
    def read(cls, file: Path) -> _Noted | None:
        try:
            noted: dict[str, Any] = json.loads(file.read_text())
            if noted["format"] != 2:
                raise ValueError(noted["format"])
            digests = [bytes.fromhex(digest) for digest in noted["sha256"]]
            # `left_out` before the word changed: a run that was cut off then is continued.
            entries = noted["excluded"] if "excluded" in noted else noted["left_out"]
            excluded = [Excluded(**entry) for entry in entries]
            return cls(noted["rows"], digests, excluded, noted["pseudo_classes"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingProblem(
                f"{file} is damaged or of another version: restore it, or start over with --restart"
            ) from error


def load_inputs(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | StoredVectors | None,
    preprocessing: Preprocessing,
    settings: FitSettings,
    out: Path,
    report: Callable[[Progress], None] = lambda _: None,
) -> Inputs:
    """The inputs of the run in folder `out`, prepared where they are not yet.

    Items without labels get `settings.pseudo_classes` classes (or a number that suits) by k-means over the old vectors.

    Raises TrainingProblem for images, labels, stored vectors or a cache that cannot be used, ImagesUnavailable and
    EncoderProblem as the image source and the encoder do. What was prepared until then is kept.
    """
    if isinstance(old, StoredVectors) and len(old.vectors) != len(items):
        raise TrainingProblem(
            f"{len(old.vectors)} old vectors do not match {len(items)} training images: give a vector for each, in the "
            "order of the images"
        )

    def report_stage(stage: Literal["images", "old vectors"], done: int, of: int, images_per_second: float) -> None:
        report(Progress(stage, 0, settings.epochs, done, of, images_per_second=images_per_second))

    folder = settings.cache or out / "images"
    gather = _Gather(items, images, out / "inputs.json", settings.image_threads, settings.max_excluded, report_stage)
    noted = _Noted.read(gather.file)
    steps = [preprocessing]
    views: list[Path] = []
    if isinstance(old, Encoder):
        views = _views(out, flip=settings.flip)
        encoded = noted is not None and all(_whole(file, len(noted.rows), old.dim) is not None for file in views)
        if not encoded and pixel_key(old.manifest.preprocessing) != pixel_key(preprocessing):
            steps.append(old.manifest.preprocessing)
    noted, pixels = _prepared(gather, noted, steps, folder, limit=int(settings.cache_gib * 2**30))
    vectors: list[NDArray[np.float32]] = []
    if isinstance(old, StoredVectors):
        vectors = [old.vectors[noted.rows]]
    elif old is not None:
        paths = [items.paths[row] for row in noted.rows]
        vectors = _old_vectors(
            old, pixels[-1], noted.digests, paths, views, size=settings.batch_size, report=report_stage
        )
    if items.labels is None:
        labels, class_names = _pseudo_labels(noted, vectors[0] if vectors else None, settings, gather.file)
    else:
        class_names = items.classes
        number = {label: position for position, label in enumerate(class_names)}
        labels = np.array([number[items.labels[row]] for row in noted.rows], np.int64)
    if len(np.unique(labels)) < 2:
        raise TrainingProblem(f"the {len(labels)} readable training images are all of one class: add another")
    train, held_out = held_out_split(labels, settings.validation, seed=settings.seed)
    if len(train) < settings.batch_size:
        smaller = f" or set train.batch_size to {len(train)} or less" if len(train) > 1 else ""
        raise TrainingProblem(
            f"{len(train)} images are left to train on ({len(held_out)} held out, {len(items) - len(labels)} left "
            f"out), fewer than a batch of {settings.batch_size}: add images{smaller}"
        )
    random = np.random.default_rng(settings.seed)
    return Inputs(
        pixels=pixels[0],
        digests=noted.digests,
        labels=labels,
        classes=len(class_names),
        class_names=class_names,
        old=vectors[0] if vectors else None,
        old_flipped=vectors[1] if len(vectors) > 1 else None,
        excluded=noted.excluded,
        train=train,
        queries=np.sort(random.permutation(held_out)[:QUERY_LIMIT]),
        gallery=np.sort(random.permutation(train)[:GALLERY_LIMIT]),
    )


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gather:
    """Reads the images of a run into the cache."""

    items: TrainingItems
    images: ImageSource
    file: Path
    workers: int
    max_excluded: float
    report: Report

    def all(self, cache: ImageCache) -> _Noted:
        """Every image, and notes which can be used."""
        paths = self.items.paths
        noted = _Noted([], [], [])
        for batch in self._batches(cache, paths):
            for row, result in enumerate(batch, len(noted.rows) + len(noted.excluded)):
                if isinstance(result, Excluded):
                    noted.excluded.append(result)
                else:
                    noted.rows.append(row)
                    noted.digests.append(result)
            if len(noted.excluded) > self.max_excluded * len(paths):
                break  # no use in reading the others
        if len(noted.excluded) > self.max_excluded * len(paths) or not noted.rows:
            raise TrainingProblem(
                f"{len(noted.excluded)} of {len(paths)} training images cannot be used (first: "
                f"{noted.excluded[0].reason}): repair or remove them; up to {self.max_excluded:.0%} may be excluded"
            )
        noted.write(self.file)
        return noted

    def again(self, cache: ImageCache, noted: _Noted) -> None:
        """The images that the cache has lost since they were noted."""
        positions = cache.lacks(noted.digests)
        paths = [self.items.paths[noted.rows[position]] for position in positions]
        done = 0
        for batch in self._batches(cache, paths):
            for path, position, result in zip(paths[done:], positions[done:], batch, strict=False):
                if result != noted.digests[position]:
                    change = f"cannot be used any more ({result.reason})" if isinstance(result, Excluded) else "changed"
                    raise TrainingProblem(
                        f"image {path!r} {change} since this run read it: put it back, or start over with --restart"
                    )
            done += len(batch)

    def _batches(self, cache: ImageCache, paths: Sequence[str]) -> Iterator[list[bytes | Excluded]]:
        started, done = time.monotonic(), 0
        for batch in cache.add(paths, self.images, workers=self.workers):
            done += len(batch)
            self.report("images", done, len(paths), done / max(time.monotonic() - started, 1e-9))
            yield batch


def _prepared(
    gather: _Gather, noted: _Noted | None, steps: Sequence[Preprocessing], folder: Path, *, limit: int
) -> tuple[_Noted, list[Pixels]]:
    """Which images are used, and their pixels by each of the preprocessings."""
    if noted is not None:
        found = [open_pixels(folder, step, noted.digests) for step in steps]
        pixels = [one for one in found if one is not None]
        if len(pixels) == len(steps):
            return noted, pixels

    def waiting() -> None:
        gather.report("images", 0, len(gather.items), 0.0)

    with ImageCache(folder, steps, limit=limit, waiting=waiting) as cache:
        if noted is None:
            noted = gather.all(cache)
        else:
            gather.again(cache, noted)
        return noted, [cache.open(step, noted.digests) for step in steps]


# --- the old side ---------------------------------------------------------------------------------------------------


def _views(out: Path, *, flip: bool) -> list[Path]:
    """Where the old vectors are kept: of the images, and with `flip` of their mirror images."""
    return [out / "old_vectors.npy", out / "old_vectors_mirrored.npy"] if flip else [out / "old_vectors.npy"]


def _old_vectors(
    old: Encoder,
    pixels: Pixels,
    digests: Sequence[bytes],
    paths: Sequence[str],
    views: Sequence[Path],
    *,
    size: int,
    report: Report,
) -> list[NDArray[np.float32]]:
    """The old encoder's vectors (n, D) in each view, as memory maps, encoded where they are not there yet."""
    # What was begun for another encoder or other images must not be continued.
    binding = hashlib.sha256(b"".join([old.id.encode(), size.to_bytes(8), *digests])).hexdigest()[:16]
    found = []
    for view, file in enumerate(views):
        vectors = _whole(file, len(pixels), old.dim)
        if vectors is None:
            part = file.with_name(f"{file.name}.{binding}.part")
            for other in file.parent.glob(f"{file.name}.*.part"):
                if other != part:
                    other.unlink()

            def progress(done: int, rate: float, before: int = view * len(pixels)) -> None:
                report("old vectors", before + done, len(views) * len(pixels), rate)

            _encode_all(old, pixels, paths, part, mirrored=view == 1, size=size, progress=progress)
            part.replace(file)
            vectors = np.load(file, mmap_mode="r")
        found.append(vectors)
    return found


def _whole(file: Path, rows: int, dim: int) -> NDArray[np.float32] | None:
    """The vectors in a file, if it holds all of them."""
    try:
        vectors: NDArray[np.float32] = np.load(file, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return vectors if vectors.shape == (rows, dim) and vectors.dtype == np.float32 else None


def _encode_all(
    old: Encoder,
    pixels: Pixels,
    paths: Sequence[str],
    part: Path,
    *,
    mirrored: bool,
    size: int,
    progress: Callable[[int, float], None],
) -> None:
    """Makes `part` a .npy file of all vectors, batch by batch, continuing after the whole batches that are in it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (len(pixels), old.dim)}
    )
    row_bytes = 4 * old.dim
    started = time.monotonic()
    with part.open("ab") as file:
        if file.tell() < header.tell():
            file.truncate(0)
            file.write(header.getvalue())
            file.flush()
        # Whole batches, so that every image is encoded in the batch it would have been in: the last bits may differ.
        first = (file.tell() - header.tell()) // row_bytes // size
        file.truncate(header.tell() + first * size * row_bytes)
        starts = range(first * size, len(pixels), size)

        def pixels_of(batch: int) -> NDArray[np.uint8]:
            taken = pixels.take(np.arange(starts[batch], min(starts[batch] + size, len(pixels))))
            return taken[..., ::-1] if mirrored else taken

        for start, taken in zip(starts, batches_ahead(pixels_of, len(starts)), strict=True):
            try:
                vectors = old.encode(taken)
            except EncoderProblem as problem:
                if not problem.rows:
                    raise
                raise TrainingProblem(
                    f"old encoder {old.id} gives no usable vector (zero or not finite) for {len(problem.rows)} of "
                    f"{len(taken)} images, the first {paths[start + problem.rows[0]]!r}: remove it from the training "
                    "items"
                ) from problem
            file.write(vectors.astype("<f4").tobytes())
            file.flush()
            done = start + len(taken)
            progress(done, (done - starts.start) / max(time.monotonic() - started, 1e-9))
        os.fsync(file.fileno())


def _pseudo_labels(
    noted: _Noted, old: NDArray[np.float32] | None, settings: FitSettings, file: Path
) -> tuple[NDArray[np.int64], list[str]]:
    """Labels (n,) by clustering the old vectors, and names for them. Noted, so that a resumed run has the same."""
    if noted.pseudo_classes is None:
        from migrator.trainer.data.pseudo import default_k, pseudo_classes

        if old is None:
            raise TrainingProblem(
                "the training images have no labels, and without old vectors there is nothing to make classes from: "
                "give labels or an old encoder"
            )
        found = pseudo_classes(np.asarray(old), settings.pseudo_classes or default_k(len(old)), seed=settings.seed)
        noted = replace(noted, pseudo_classes=found.tolist())
        noted.write(file)
    labels = np.array(noted.pseudo_classes, np.int64)
    return labels, [f"cluster {number}" for number in range(int(labels.max()) + 1)]
