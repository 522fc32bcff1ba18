"""Altered views of images: the queries where nothing is known of the items but their own images."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_JPEG_LONGEST = 65_500
"""The format holds no longer side."""


def altered(image: Image.Image, key: str, seed: int) -> Image.Image:
    """A view of `image`: a part of it, lighter or darker, and either blurred a little or compressed. Mode RGB.

    The part has 60 to 90 % of the area and nearly the shape of the whole; brightness and contrast change by up to 20 %;
    the blur's radius is at most half a percent of the shorter side (but may be a pixel), the JPEG's quality at least
    60. `key` and `seed` decide alone: the same two give the same view, with the same Pillow, in every process.
    """
    from PIL import Image, ImageEnhance, ImageFilter

    draw = random.Random(f"{seed} {key!a}")
    view = image.convert("RGB")
    width, height = view.size
    side, shape = draw.uniform(0.6, 0.9) ** 0.5, draw.uniform(0.95, 1 / 0.95)  # their product stays below 1
    wide, high = max(1, round(width * side * shape)), max(1, round(height * side / shape))
    left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
    view = view.crop((left, top, left + wide, top + high))
    view = ImageEnhance.Brightness(view).enhance(draw.uniform(0.8, 1.2))
    view = ImageEnhance.Contrast(view).enhance(draw.uniform(0.8, 1.2))
    compressed, strength = draw.random() < 0.5, draw.random()
    if not compressed or max(wide, high) > _JPEG_LONGEST:
        return view.filter(ImageFilter.GaussianBlur(max(0.3 + 0.7 * strength, 0.005 * strength * min(wide, high))))
    file = io.BytesIO()
    view.save(file, "JPEG", quality=60 + round(30 * strength))
    file.seek(0)
    with Image.open(file) as opened:
        return opened.convert("RGB")
