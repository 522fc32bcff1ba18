"""From a decoded picture to the numbers that a model is fed: orientation, transparency, size and scale, as declared."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from migrator.trainer.errors import EncoderProblem, ImageProblem
from migrator.trainer.images.conversion import Convert, Exif, to_rgb
from migrator.trainer.images.resizing import WITHOUT_ANTIALIAS, Interpolation, Span, resized, scaled_size
from migrator.trainer.text import one_line, sanitized

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


Resize = Literal["squash", "crop", "letterbox", "border"]
Channels = Literal["rgb", "bgr"]
MAX_IMAGE_SIZE = 4096
MIN_CROP, MAX_CROP = 0.1, 2.0
_COLOUR = re.compile(r"white|black|#[0-9a-fA-F]{6}")
_FIRST_FIELDS = frozenset({"image_size", "resize", "interpolation", "mean", "std", "crop_pct"})
"""What every manifest holds. A later field is in it, and so in the encoder's id, only when it is not at its default."""


@dataclass(frozen=True)
class Preprocessing:
    """How a decoded picture becomes a model's input: converted to RGB, resized, cut or padded, normalised per channel.

    With t = floor(image_size / crop_pct) for each side, `squash` scales the picture to t, whatever its shape; `crop`
    scales it until it covers t, and `letterbox` and `border` until it fits into t. Then the centre of image_size is cut
    out, and what is not covered is padded: with the mean colour by `border`, with `fill` by the others. These are the
    pixels of timm's and torchvision's transforms, up to rounding. Without `antialias` they are those of OpenCV's
    `cv2.resize`, and of torch tensors. Mean and standard deviation default to ImageNet's.

    `transform` names a factory (`package.module:factory`) of a callable from the converted picture to a float tensor
    (3, height, width), which does all the rest; see `migrator.trainer.images.transforms`.

    Raises EncoderProblem for values outside their range, and for ones that exclude each other.
    """

    image_size: int | tuple[int, int]
    """Pixels a side of a square, or (height, width)."""
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 1.0
    exif: Exif = "apply"
    """`exif`, `alpha` and `convert` are those of `migrator.trainer.images.conversion.to_rgb`."""
    alpha: str = "white"
    convert: Convert = "scaled"
    fill: str = "black"
    """A colour like `alpha`: white, black or #rrggbb."""
    antialias: bool = True
    channels: Channels = "rgb"
    """The order in which the model takes them, and in which `mean` and `std` stand."""
    transform: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _checked_size(self.image_size))
        for name, known in (
            ("resize", Resize),
            ("interpolation", Interpolation),
            ("exif", Exif),
            ("convert", Convert),
            ("channels", Channels),
            ("antialias", Literal[True, False]),
        ):
            _require_one_of(name, getattr(self, name), get_args(known))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _checked_numbers(name, getattr(self, name)))
        if isinstance(self.crop_pct, bool) or not isinstance(self.crop_pct, int | float):
            raise EncoderProblem(f"crop_pct {self.crop_pct!r} must be a number")
        if not MIN_CROP <= self.crop_pct <= MAX_CROP:
            raise EncoderProblem(f"crop_pct {self.crop_pct!r} must be from {MIN_CROP} to {MAX_CROP}")
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        object.__setattr__(self, "alpha", _checked_colour("alpha", self.alpha, "drop"))
        object.__setattr__(self, "fill", _checked_colour("fill", self.fill))
        if not self.antialias and self.interpolation not in WITHOUT_ANTIALIAS:
            raise EncoderProblem(
                f"antialias false goes with interpolation {', '.join(WITHOUT_ANTIALIAS)}, not {self.interpolation}"
            )
        if self.transform is not None:
            self._leave_to_transform()
        elif self.convert == "none":
            raise EncoderProblem("convert none goes with a transform, which then converts the picture")

    def _leave_to_transform(self) -> None:
        """Refuses what the transform does itself. It normalises too: nothing is subtracted or divided afterwards."""
        replaced = {"resize", "interpolation", "mean", "std", "crop_pct", "fill", "antialias", "channels"}
        neutral = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        for field in fields(self):
            if field.name in replaced and getattr(self, field.name) not in (field.default, neutral.get(field.name)):
                raise EncoderProblem(f"{field.name} is a matter of the transform {self.transform!r}: remove it")
        for name, value in neutral.items():
            object.__setattr__(self, name, value)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def dtype(self) -> type[np.uint8] | type[np.float32]:
        """Of what `prepare` gives."""
        return np.uint8 if self.transform is None else np.float32

    @property
    def levels(self) -> float:
        """What is 1 for `mean` and `std` in the numbers that `prepare` gives."""
        return 255.0 if self.transform is None else 1.0

    def declared(self) -> dict[str, Any]:
        """As manifests, ids and the image cache hold it: without later fields that are at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        values = asdict(self)
        return {name: values[name] for name in values if name in _FIRST_FIELDS or values[name] != defaults[name]}

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The decoded picture in RGB and turned as declared. Raises ImageProblem where it cannot be converted."""
        try:
            return to_rgb(image, exif=self.exif, alpha=self.alpha, convert=self.convert)
        except Exception as error:  # over a forged file Pillow may raise anything
            raise _problem(image, "cannot be converted", error) from error

    def prepare(self, image: Image.Image) -> NDArray[np.uint8] | NDArray[np.float32]:
        """A decoded picture, as `ImageSource.load` or `PIL.Image.open` gives it, as a model's input.

        (3, height, width) uint8; where there is a transform its float32. Safe in many threads.
        Raises ImageProblem where this picture cannot be used.
        """
        picture = self.to_rgb(image)
        if self.transform is not None:
            from migrator.trainer.images.transforms import transformed

            try:
                return transformed(self.transform, picture, self.size)
            except ValueError as error:
                raise _problem(image, "cannot be used", error) from error
        pixels = np.asarray(self._resized(picture)).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels[::-1] if self.channels == "bgr" else pixels)

    def _resized(self, image: Image.Image) -> Image.Image:
        from PIL import Image

        height, width = self.size
        scaled = scaled_size(self.resize, (image.height, image.width), self.size, self.crop_pct)
        rows = Span.centred(original=image.height, scaled=scaled[0], size=height)
        columns = Span.centred(original=image.width, scaled=scaled[1], size=width)
        part = resized(image, rows, columns, self.interpolation, antialias=self.antialias)
        if part.size == (width, height):
            return part
        whole = Image.new("RGB", (width, height), self._padding())
        whole.paste(part, (columns.offset, rows.offset))
        return whole

    def _padding(self) -> str | tuple[int, ...]:
        if self.resize != "border":
            return self.fill
        mean = self.mean if self.channels == "rgb" else self.mean[::-1]
        return tuple(min(255, max(0, round(255 * value))) for value in mean)


def _problem(image: Image.Image, what: str, error: Exception) -> ImageProblem:
    """By the name of the picture's file, where it is known."""
    name = getattr(image, "filename", "")
    return ImageProblem(f"image {sanitized(name) + ' ' if name else ''}{what}: {one_line(error)}")


def fingerprint_image() -> Image.Image:
    """256 pixels high, 192 wide: a ramp down in red, a ramp across in green, a chequerboard of 32 pixels in blue.

    Made in integers, so the same everywhere; swapped channels, flips and another way of resizing all show.
    """
    from PIL import Image

    rows, columns = np.mgrid[0:256, 0:192]
    board = (rows // 32 + columns // 32) % 2 * 255
    return Image.fromarray(np.stack([rows, columns, board], axis=2).astype(np.uint8))


def _require_one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known or type(value) is not type(known[0]):
        raise EncoderProblem(f"{name} {value!r} must be one of {', '.join(map(str, known))}")


def _checked_size(value: Any) -> int | tuple[int, int]:
    """One number for a square, however it is written, so that the same input has the same id."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= MAX_IMAGE_SIZE for side in sides):
        raise EncoderProblem(
            f"image_size {value!r} must be a whole number from 1 to {MAX_IMAGE_SIZE}, or [height, width] of such"
        )
    return sides[0] if sides[0] == sides[1] else sides


def _checked_numbers(name: str, given: Any) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise EncoderProblem(f"{name} {given!r} must be three numbers") from error
    if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise EncoderProblem(f"{name} {values} must be three finite numbers, and std positive")
    return values


def _checked_colour(name: str, value: Any, *others: str) -> str:
    """The colour as one text, however it is written."""
    if not isinstance(value, str) or not (value in others or _COLOUR.fullmatch(value)):
        known = ", ".join((*others, "white", "black"))
        raise EncoderProblem(f'{name} {value!r} must be {known}, or a colour as "#rrggbb"')
    return {"#ffffff": "white", "#000000": "black"}.get(value.lower(), value.lower())
