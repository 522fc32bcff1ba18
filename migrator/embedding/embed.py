"""Images of items to vectors, with the images that fail set aside by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from migrator.retry import with_retries
from migrator.trainer.errors import EncoderProblem, ImageProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.images.source import ImageSource


class Images(Protocol):
    """Where pictures are loaded from, as `ImageSource` does. Used from many threads."""

    def load(self, path: str) -> Image.Image:
        """The picture at `path`. Raises ImageProblem, ImagesUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of those images that could be embedded, by one or several encoders."""

    rows: NDArray[np.int64]  # (n,) positions in what was asked for, ascending
    vectors: Sequence[NDArray[np.float32]]  # one (n, dim) array for each encoder, unit length
    problems: dict[int, str]
    """Position -> why it has no vector."""


def embed(
    images: Images,
    paths: Iterable[str | ImageProblem],
    encoders: Sequence[Encoder],
    *,
    batch_size: int,
    threads: int,
    retry_for: float,
    report: Callable[[int], None] = lambda _: None,
    view: Callable[[Image.Image, str], Image.Image] | None = None,
) -> Embedded:
    """Embeds the images at `paths`, each loaded once for all encoders. `report` is called for each, usable or not, with
    their number since the last call.

    With `view` each encoder gets what that makes of the picture, in RGB as the encoder declares it, and its path.
    An `ImageProblem` in place of a path is passed on as that image's problem. Raises `ImagesUnavailable`.
    """
    rows: list[int] = []
    vectors: list[list[NDArray[np.float32]]] = [[] for _ in encoders]
    problems: dict[int, str] = {}

    def load(path: str | ImageProblem) -> list[NDArray[Any]]:
        if isinstance(path, ImageProblem):
            raise path
        image = with_retries(lambda: images.load(path), seconds=retry_for)
        if view is None:
            return [encoder.prepare(image) for encoder in encoders]
        return [encoder.prepare(view(encoder.manifest.preprocessing.to_rgb(image), path)) for encoder in encoders]

    def flush(batch: Sequence[tuple[int, list[NDArray[Any]]]]) -> None:
        found: list[dict[int, NDArray[np.float32]]] = []
        for which, encoder in enumerate(encoders):
            found.append({})
            for row, vector in encode_batch(encoder, [(row, image[which]) for row, image in batch]):
                if isinstance(vector, str):
                    problems[row] = vector
                else:
                    found[-1][row] = vector
        for row, _ in batch:
            if row not in problems:
                rows.append(row)
                for which, vectors_of_one in enumerate(vectors):
                    vectors_of_one.append(found[which][row])

    pool = ThreadPoolExecutor(threads, "image")
    try:
        batch: list[tuple[int, list[NDArray[Any]]]] = []
        for row, future in enumerate(_ahead(pool, load, paths, window=4 * batch_size)):
            try:
                batch.append((row, future.result()))
            except ImageProblem as problem:
                problems[row] = str(problem)
            report(1)
            if len(batch) == batch_size:
                flush(batch)
                batch = []
        if batch:
            flush(batch)
    finally:
        pool.shutdown(cancel_futures=True)  # else an unreachable source is retried for every image that waits
    stacked = [
        np.stack(of_one) if of_one else np.empty((0, encoder.dim), np.float32)
        for of_one, encoder in zip(vectors, encoders, strict=True)
    ]
    return Embedded(np.array(rows, np.int64), stacked, problems)


def _ahead(
    pool: ThreadPoolExecutor,
    load: Callable[[str | ImageProblem], list[NDArray[Any]]],
    paths: Iterable[str | ImageProblem],
    *,
    window: int,
) -> Iterator[Future[list[NDArray[Any]]]]:
    waiting: deque[Future[list[NDArray[Any]]]] = deque()
    for path in paths:
        waiting.append(pool.submit(load, path))
        if len(waiting) >= window:
            yield waiting.popleft()
    yield from waiting


def encode_batch(
    encoder: Encoder, batch: Sequence[tuple[int, NDArray[Any]]]
) -> Iterator[tuple[int, NDArray[np.float32] | str]]:
    """The vector of each (row, image), or why that image has none. A fault of the encoder itself is raised."""
    try:
        vectors = encoder.encode(np.stack([image for _, image in batch]))
    except EncoderProblem as problem:
        if not problem.rows:
            raise
        for at in problem.rows:
            yield batch[at][0], str(problem)
        good = [image for at, image in enumerate(batch) if at not in problem.rows]
        if good:
            yield from encode_batch(encoder, good)
        return
    yield from ((row, vector) for (row, _), vector in zip(batch, vectors, strict=True))


def locate(images: ImageSource, items: Iterable[tuple[int | str, object]]) -> list[str | ImageProblem]:
    """The path of each (id, payload), or the problem with it."""
    paths: list[str | ImageProblem] = []
    for item, payload in items:
        try:
            paths.append(images.locate(item, payload))  # type: ignore[arg-type]
        except ImageProblem as problem:
            paths.append(problem)
    return paths
