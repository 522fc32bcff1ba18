"""An encoder of a migration for the application that searches: images become the vectors that the backfill makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from migrator.project import Project
from migrator.trainer.errors import EncoderProblem, ImageProblem

if TYPE_CHECKING:
    from PIL import Image

    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.images.preprocessing import Preprocessing

Picture: TypeAlias = Union[str, Path, bytes, bytearray, memoryview, "Image.Image", NDArray[Any]]
"""A file's path, a file's bytes, a decoded picture, or its pixels: (H, W, 3) RGB, uint8, or floating from 0 to 1."""


def load_encoder(
    config: str | Path, name: str | None = None, *, which: str | None = None, device: str = "auto"
) -> ServedEncoder:
    """The encoder of a migration, proved to be the one that it was planned, trained or verified with.

    `name` is a migration of the file at `config`, and needed where it holds several. `which` is `old`, `new` or an
    encoder's id, as the route names it; by default the new one, if there is one. `device` is `auto`, `cpu`, `cuda` or
    `cuda:1`. Nothing is written, but the ledger's tables if it has none.

    Raises `MigratorError` for the configuration or the ledger, `migrator.trainer.errors.EncoderProblem` where the
    encoder cannot be loaded, and its subclass `EncoderMismatch` where it is not what it was.
    """
    with Project.open(Path(config), name) as project:
        spec, expected = project.declared_encoder(which)
        encoder = project.load_only(spec, expected, device=device)
        settings = project.settings
        return ServedEncoder(encoder, batch_size=settings.backfill.batch_size, max_pixels=settings.images.max_pixels)


class ServedEncoder:
    """Images in, vectors out. Safe in many threads.

    A file, its bytes and a picture opened by `PIL.Image.open` are prepared to the bit as the backfill prepares them. An
    array has lost its file's mode, transparency and orientation: it is taken as RGB that lies as it is to be seen.
    """

    def __init__(self, encoder: Encoder, *, batch_size: int, max_pixels: int) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._max_pixels = max_pixels

    @property
    def id(self) -> str:
        """The encoder's id, as the route and the stamps have it."""
        return self._encoder.id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._encoder.dim

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the model's input."""
        return self._encoder.manifest.preprocessing

    def encode(self, images: Picture | Iterable[Picture]) -> NDArray[np.float32]:
        """(n, dim) float32 of unit length, a row for each image; one image alone is a batch of one.

        Raises `migrator.trainer.errors.ImageProblem` for the first image that cannot be used, with its position and
        reason, and `EncoderProblem` where the encoder gives one no usable vector.
        """
        rows = [self._encode(batch) for batch in self._batches(_as_pictures(images))]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)

    __call__ = encode

    def prepare(self, image: Picture) -> NDArray[Any]:
        """(3, height, width): the model's input, as the backfill makes it. Raises `ImageProblem`."""
        return self._encoder.prepare(self._picture(image))

    def _batches(self, pictures: Iterable[Picture]) -> Iterator[list[tuple[int, NDArray[Any]]]]:
        batch: list[tuple[int, NDArray[Any]]] = []
        for position, picture in enumerate(pictures):
            try:
                batch.append((position, self.prepare(picture)))
            except ImageProblem as problem:
                raise ImageProblem(f"image {position}: {problem}") from problem
            if len(batch) == self._batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _encode(self, batch: Sequence[tuple[int, NDArray[Any]]]) -> NDArray[np.float32]:
        try:
            return self._encoder.encode(np.stack([prepared for _, prepared in batch]))
        except EncoderProblem as problem:
            if not problem.rows:
                raise
            at = tuple(batch[row][0] for row in problem.rows)
            raise EncoderProblem(
                f"encoder {self.id} gives no usable vector (zero or not finite) for image {at[0]}", rows=at
            ) from problem

    def _picture(self, image: Picture) -> Image.Image:
        from PIL import Image

        from migrator.trainer.images.source import decode, open_file

        if isinstance(image, Image.Image):
            return image
        if isinstance(image, bytes | bytearray | memoryview):
            return decode(bytes(image), "of bytes", self._max_pixels)
        if isinstance(image, str | Path):
            return open_file(image, self._max_pixels)
        return Image.fromarray(_as_bytes(image))


def _as_pictures(images: Any) -> Iterable[Picture]:
    """One picture as a list of one. An array of four dimensions is a batch."""
    from PIL import Image

    if isinstance(images, str | Path | bytes | bytearray | memoryview | Image.Image):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim <= 3:
        return [images]
    return images  # type: ignore[no-any-return]


def _as_bytes(pixels: Any) -> NDArray[np.uint8]:
    """(H, W, 3) RGB as uint8. Raises ImageProblem."""
    kinds = "a path, bytes, a PIL image, or an array (H, W, 3) of RGB"
    if not isinstance(pixels, np.ndarray):
        raise ImageProblem(f"a {type(pixels).__name__} is no image: give {kinds}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ImageProblem(f"an array of shape {pixels.shape} is no image: give {kinds}")
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ImageProblem(f"an array of {pixels.dtype} is no image: give uint8, or floating-point numbers from 0 to 1")
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 1:  # also false for NaN
        raise ImageProblem(
            f"an array of {pixels.dtype} runs from {low:g} to {high:g}, not from 0 to 1: divide it by 255, or give it "
            "as it was before it was normalised"
        )
    return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
