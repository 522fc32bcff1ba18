"""Altered views: the same for the same key and seed, mild, and of any image."""

from __future__ import annotations

from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from migrator.verify.query_set import augmented
from migrator.verify.query_set.augmented import altered


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth, as photographs are, and bright in one corner, so that places can be told apart."""
    small = np.random.default_rng(seed).integers(60, 200, (4, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def test_key_and_seed_decide_alone() -> None:
    image = picture()
    before = image.tobytes()
    view = altered(image, "a.png", 7)
    assert same(view, altered(image.copy(), "a.png", 7))
    assert not same(view, altered(image, "b.png", 7))
    assert not same(view, altered(image, "a.png", 8))
    assert image.tobytes() == before, "the original stays as it is"
    assert same(altered(picture(), "\ud800\n", 0), altered(picture(), "\ud800\n", 0)), "any text can be a key"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.text(max_size=5), st.integers(0, 2**32 - 1))
def test_a_view_has_60_to_90_percent_of_the_area(width: int, height: int, key: str, seed: int) -> None:
    view = altered(Image.new("RGB", (width, height), "gray"), key, seed)
    assert view.mode == "RGB"
    wide, high = view.size
    assert 1 <= wide <= width
    assert 1 <= high <= height
    # A side is rounded to whole pixels, and is at least one.
    assert (wide - 0.5) * (high - 0.5) <= 0.9 * width * height or 1 in (wide, high)
    assert (wide + 0.5) * (high + 0.5) >= 0.6 * width * height


def test_views_differ_from_the_image_and_stay_like_it() -> None:
    """The same place of the image looks nearly alike: found again by the least squares over all places."""
    image = np.asarray(picture(48, 32), np.float64)
    sides, means = set(), set()
    for seed in range(12):
        view = np.asarray(altered(picture(48, 32), "x", seed), np.float64)
        high, wide, _ = view.shape
        distances = [
            np.abs(image[top : top + high, left : left + wide] - view).mean()
            for top in range(32 - high + 1)
            for left in range(48 - wide + 1)
        ]
        assert 0.5 < min(distances) < 40
        sides.add((wide, high))
        means.add(round(view.mean()))
    assert len(sides) > 6
    assert len(means) > 6


def test_some_views_are_compressed_and_others_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Image.Image.save

    def noted(image: Image.Image, file: IO[bytes], kind: str, *, quality: int) -> None:
        saved.append(quality)
        save(image, file, kind, quality=quality)

    monkeypatch.setattr(Image.Image, "save", noted)
    for seed in range(40):
        altered(picture(), "x", seed)
    assert 8 < len(saved) < 32
    assert min(saved) >= 60
    assert max(saved) <= 90
    saved.clear()
    monkeypatch.setattr(augmented, "_JPEG_LONGEST", 10)
    for seed in range(40):
        altered(picture(), "x", seed)
    assert saved == []


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert altered(picture().convert(mode), "x", 0).mode == "RGB"
