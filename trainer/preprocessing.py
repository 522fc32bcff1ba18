"""From a picture to the numbers that a model is fed: resize, cut, scale, normalise; declared, or as timm has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer.errors import EncoderProblem

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["squash", "crop"]

_LARGEST_IMAGE = 4096
_LEAST_CROP = 0.1


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB picture becomes the model's input: resized, cut to a square, scaled to 0..1, normalised per channel.

    With s = floor(image_size / crop_pct), `squash` scales the picture to s x s, whatever its shape, and `crop` scales
    its shorter side to s; then the centred square of image_size is cut out. Both give the pixels of timm's and
    torchvision's Resize and CenterCrop, up to rounding. Mean and standard deviation default to ImageNet's.
    Raises EncoderProblem for values outside their range.
    """

    image_size: int  # pixels a side
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= _LARGEST_IMAGE:
            raise EncoderProblem(f"image_size {self.image_size!r} must be a whole number from 1 to {_LARGEST_IMAGE}")
        for name, value, known in (
            ("resize", self.resize, get_args(Resize)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in known:
                raise EncoderProblem(f"{name} {value!r} must be one of {', '.join(known)}")
        for name in ("mean", "std"):
            try:
                values = tuple(float(value) for value in getattr(self, name))
            except (TypeError, ValueError) as error:
                raise EncoderProblem(f"{name} {getattr(self, name)!r} must be three numbers") from error
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise EncoderProblem(f"{name} {values} must be three finite numbers, and std positive")
            object.__setattr__(self, name, values)
        if isinstance(self.crop_pct, bool) or not isinstance(self.crop_pct, int | float):
            raise EncoderProblem(f"crop_pct {self.crop_pct!r} must be a number")
        if not _LEAST_CROP <= self.crop_pct <= 1:
            raise EncoderProblem(f"crop_pct {self.crop_pct!r} must be from {_LEAST_CROP} to 1")
        object.__setattr__(self, "crop_pct", float(self.crop_pct))

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB picture as a model's input, (3, S, S) uint8. Safe in many threads, and does not use torch."""
        from PIL.Image import Resampling

        size = self.image_size
        width, height = image.size
        scaled_width, scaled_height = self._scaled(width, height)
        if (scaled_width, scaled_height) != (width, height) or (width, height) != (size, size):
            resampling = Resampling.BICUBIC if self.interpolation == "bicubic" else Resampling.BILINEAR
            # The square's place in the picture as it came: only the square is resized, however long the picture is.
            left, right = _centred(size, scaled_width, width)
            top, bottom = _centred(size, scaled_height, height)
            image = image.resize((size, size), resampling, box=(left, top, right, bottom))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Size of the picture once it is resized and before the square is cut out."""
        side = math.floor(self.image_size / self.crop_pct)
        if self.resize == "squash":
            return side, side
        shorter = min(width, height)
        return side * width // shorter, side * height // shorter


def _centred(size: int, scaled: int, original: int) -> tuple[float, float]:
    """Where the centred `size` of a side scaled to `scaled` begins and ends on the `original` side."""
    first = round((scaled - size) / 2)
    return first * original / scaled, (first + size) * original / scaled


def timm_preprocessing(arch: str, **given: Any) -> Preprocessing:
    """What timm's data config says of an architecture's pretrained weights; `given` fields of Preprocessing go first.

    Raises EncoderProblem where timm knows no such architecture or has it prepared in a way that is not supported.
    """
    from trainer.backbones import timm_settings
    from trainer.torchvision_cpu import import_timm

    settings = timm_settings(arch)
    if settings is None or not settings.input_size:
        raise EncoderProblem(
            f"timm has no data config for architecture {arch!r}: give image_size, mean, std and resize"
        )
    config = import_timm().data.resolve_data_config(pretrained_cfg=settings.to_dict())
    modes: dict[str, Resize] = {"center": "crop", "squash": "squash"}
    values: dict[str, Any] = {
        "image_size": config["input_size"][-1],
        "resize": modes.get(config["crop_mode"], config["crop_mode"]),
        "interpolation": config["interpolation"],
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        **given,
    }
    try:
        return Preprocessing(**values)
    except EncoderProblem as problem:
        raise EncoderProblem(f"timm's data config for architecture {arch!r}: {problem}: give this key") from problem
