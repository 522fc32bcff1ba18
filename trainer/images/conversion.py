"""From a decoded picture, as it lies in its file, to an upright picture in RGB: orientation, transparency, depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

Exif = Literal["apply", "ignore"]
Convert = Literal["scaled", "pil", "none"]

_ORIENTATION = 0x0112
_ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Keys in which Pillow finds an orientation."""


def to_rgb(
    image: Image.Image, *, exif: Exif = "apply", alpha: str = "white", convert: Convert = "scaled"
) -> Image.Image:
    """The picture in mode RGB. What it gives for its own result is that result.

    `exif`: whether the orientation that the file declares is applied. `alpha`: the colour that transparent pixels are
    laid on, as Pillow names colours, or `drop` to take their own colours as `Image.convert("RGB")` does.
    `convert`:

    - `scaled`: 16-bit greys are scaled to 8 bits. 32-bit integer and floating-point greys carry no scale: they are read
      as 0..65535, and as 0..1 or 0..255, where all values fit, and stretched from their least to their greatest value
      otherwise.
    - `pil`: `Image.convert("RGB")` for every mode; `alpha` is not used.
    - `none`: the picture keeps its mode; `alpha` is not used.

    An animation gives its first frame, and colour profiles are ignored. Raises ValueError for pixels that are not
    finite numbers, and for a picture that is transparent everywhere when `alpha` is a colour.
    """
    image.load()  # Pillow turns a TIFF then, and forgets its orientation
    if convert == "none":
        picture = image
    elif convert == "pil":
        picture = _plain(image)
    elif image.mode.startswith("I;16"):
        picture = _grey((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535)
    elif image.mode in ("I", "F"):
        picture = _grey(_stretched(np.asarray(image, dtype=np.float64), integers=image.mode == "I"))
    elif image.has_transparency_data and alpha != "drop":
        picture = _flattened(image, alpha)
    else:
        picture = _plain(image)
    return _upright(picture, image) if exif == "apply" else picture


def _plain(image: Image.Image) -> Image.Image:
    """`image.convert("RGB")`, without its warning about transparency that the result does not have."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _flattened(image: Image.Image, colour: str) -> Image.Image:
    from PIL import Image

    layer = image.convert("RGBA")
    mask = layer.getchannel("A")
    if mask.getextrema() == (0, 0):
        raise ValueError(
            f"it is transparent everywhere, so nothing of it shows on {colour}; alpha: drop takes its colours"
        )
    flat = Image.new("RGB", image.size, colour)
    flat.paste(layer, mask=mask)
    return flat


def _grey(values: NDArray[Any]) -> Image.Image:
    from PIL import Image

    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _stretched(values: NDArray[np.float64], *, integers: bool) -> NDArray[np.float64]:
    """Greys (height, width) without a declared scale to 0..255."""
    least, greatest = float(values.min()), float(values.max())
    if not (math.isfinite(least) and math.isfinite(greatest)):
        raise ValueError("it holds pixels that are not finite numbers")
    for limit in (65535,) if integers else (1, 255):
        if least >= 0 and greatest <= limit:
            return np.round(values * 255 / limit)
    return np.round((values - least) * 255 / (greatest - least)) if greatest > least else np.zeros_like(values)


def _upright(picture: Image.Image, original: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    try:
        orientation = int(original.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata does not spoil the picture
        return picture
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    if orientation not in turns:
        return picture
    turned = picture.transpose(turns[orientation])
    for key in _ORIENTED:
        turned.info.pop(key, None)  # who reads the result must not turn it again
    return turned
