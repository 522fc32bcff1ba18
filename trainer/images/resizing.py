"""Resizing a picture to a model's input: where each part of it goes, and how the pixels between are found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
WITHOUT_ANTIALIAS = ("nearest", "bilinear", "bicubic")

_SHARPNESS = -0.75
"""Parameter of the bicubic kernel without antialias, as OpenCV and torch have it; Pillow's is -0.5."""


@dataclass(frozen=True)
class Span:
    """One axis: the picture's `original` pixels become `scaled`, of which `length` from `first` on go to `offset`."""

    original: int
    scaled: int
    first: int
    length: int
    offset: int

    @classmethod
    def centred(cls, *, original: int, scaled: int, size: int) -> Span:
        """The centre of a scaled side where it is longer than `size`, else the whole of it in the middle.

        Halves are rounded as by torchvision's CenterCrop and timm's CenterCropOrPad.
        """
        if scaled >= size:
            return cls(original, scaled, round((scaled - size) / 2), size, 0)
        return cls(original, scaled, 0, scaled, (size - scaled) // 2)

    @property
    def box(self) -> tuple[float, float]:
        """Where the part begins and ends on the original side."""
        return self.first * self.original / self.scaled, (self.first + self.length) * self.original / self.scaled


def resized(
    image: Image.Image, rows: Span, columns: Span, interpolation: Interpolation, *, antialias: bool
) -> Image.Image:
    """The part of an RGB picture that `rows` and `columns` name, resized, and no more than that part."""
    from PIL import Image

    if (rows.original, columns.original) == (rows.scaled, columns.scaled):  # only cut
        return image.crop((columns.first, rows.first, columns.first + columns.length, rows.first + rows.length))
    if not antialias:
        return Image.fromarray(_sampled(np.asarray(image), rows, columns, interpolation))
    (left, right), (top, bottom) = columns.box, rows.box
    resampling = Image.Resampling[interpolation.upper()]
    return image.resize((columns.length, rows.length), resampling, box=(left, top, right, bottom))


def _sampled(pixels: NDArray[np.uint8], rows: Span, columns: Span, interpolation: Interpolation) -> NDArray[np.uint8]:
    """(height, width, 3) interpolated between the nearest pixels only, however much smaller it becomes.

    As `cv2.resize` and `torch.nn.functional.interpolate(antialias=False)` do. Neither is called: both would need all of
    the scaled picture, or of the original as floating-point numbers, where a few rows and columns of it are read here.
    """
    (at_rows, row_weights), (at_columns, column_weights) = _taps(rows, interpolation), _taps(columns, interpolation)
    found = np.zeros((rows.length, columns.length, 3), np.float32)
    for at_row, row_weight in zip(at_rows, row_weights, strict=True):
        for at_column, column_weight in zip(at_columns, column_weights, strict=True):
            weights = row_weight[:, None] * column_weight[None, :]
            found += weights[..., None].astype(np.float32) * pixels[at_row[:, None], at_column[None, :]]
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def _taps(span: Span, interpolation: Interpolation) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each pixel of the result the pixels (taps, length) of the original that make it, and their weights."""
    places = np.arange(span.first, span.first + span.length)
    if interpolation == "nearest":
        step = 1 / (span.scaled / span.original)  # rounded as OpenCV rounds it, which decides between two pixels
        taps, weights = np.floor(places * step).astype(np.int64)[None], np.ones((1, span.length))
    else:
        exact = (places + 0.5) * span.original / span.scaled - 0.5
        before = np.floor(exact)
        part = exact - before
        offsets = np.array([0, 1] if interpolation == "bilinear" else [-1, 0, 1, 2])[:, None]
        distance = np.abs(offsets - part)
        weights = 1 - distance if interpolation == "bilinear" else _cubic(distance)
        taps = before.astype(np.int64) + offsets
    return np.clip(taps, 0, span.original - 1), weights


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel (1981), equation 4, with the parameter above; `distance` is from 0 to 2."""
    a, x = _SHARPNESS, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)


def scaled_size(
    resize: Literal["squash", "crop", "letterbox", "border"],
    original: tuple[int, int],
    size: tuple[int, int],
    crop_pct: float,
) -> tuple[int, int]:
    """Height and width of the picture once it is scaled, before it is cut or padded to `size`: as timm has them."""
    target = [max(1, math.floor(side / crop_pct)) for side in size]
    if resize == "squash":
        return target[0], target[1]
    height, width = original
    if resize == "crop" and target[0] == target[1]:  # torchvision rounds down, timm (below) to the nearest
        shorter = min(height, width)
        return target[0] * height // shorter, target[0] * width // shorter
    pick = min if resize == "crop" else max
    ratio = pick(height / target[0], width / target[1])
    return max(1, round(height / ratio)), max(1, round(width / ratio))
