"""Transforms that a factory brings: a callable from a picture to a float tensor (3, height, width), normalised.

That is what torchvision, timm, open_clip and clip build. The factory is a function without parameters which returns the
callable, or a factory of a module which returns the pair (module, callable). What it returns is trusted to be code, not
to be right: its results are checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import MAX_IMAGE_SIZE, Preprocessing, fingerprint_image
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image


def learn_transform(name: str, folder: Path | None, **given: Any) -> Preprocessing:
    """The preprocessing of a factory's transform, with the size of input that it makes; `given` are further fields.

    By default it gets `Image.open(file).convert("RGB")`, which such transforms are written for. Its module is looked
    for in `folder` first. Raises EncoderProblem where the factory fails, or its transform does not give a finite float
    tensor (3, height, width) of one size for every picture, and the same one for the same picture.
    """
    size = given.pop("image_size", None)
    loader = {"exif": "ignore", "convert": "scaled" if "alpha" in given else "pil"}
    declared = Preprocessing(size or 1, transform=name, **{**loader, **given})
    open_transform(name, folder)
    pictures = [fingerprint_image(), fingerprint_image(), fingerprint_image().resize((80, 60))]
    results = []
    for picture in pictures:
        try:
            results.append(_result(name, declared.to_rgb(picture)))
        except ValueError as problem:
            raise EncoderProblem(one_line(problem)) from problem
    first, again, other = results
    if not np.array_equal(first, again):
        raise EncoderProblem(
            f"transform {name!r} gives two tensors for one picture: build the transform of evaluation, without chance"
        )
    if first.shape != other.shape:
        raise EncoderProblem(
            f"transform {name!r} gives {first.shape} for one picture and {other.shape} for another: let it resize or "
            "cut each to one size"
        )
    learnt = replace(declared, image_size=first.shape[1:])
    if size is not None and learnt.size != declared.size:
        raise EncoderProblem(
            f"transform {name!r} gives {learnt.size[0]} x {learnt.size[1]} pixels, but image_size says "
            f"{declared.image_size}: remove image_size"
        )
    return learnt


def open_transform(name: str, folder: Path | None) -> None:
    """Calls the factory now, so that later uses find its module wherever it is. Raises EncoderProblem."""
    _transform(name, folder)


def transformed(name: str, picture: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """What the transform makes of a picture: (3, *size) float32. Raises ValueError where that is something else."""
    array = _result(name, picture)
    if array.shape[1:] != size:
        raise ValueError(f"transform {name!r} gives {array.shape}, not {(3, *size)}")
    return array


def _transform(name: str, folder: Path | None = None) -> Callable[[Image.Image], Any]:
    from migrator.trainer.factories import call_transform_factory

    return call_transform_factory(name, folder)


def _result(name: str, picture: Image.Image) -> NDArray[np.float32]:
    """(3, height, width) float32, finite. Raises ValueError where the transform fails or gives something else."""
    import torch

    transform = _transform(name)
    named = f"transform {name!r}"
    try:
        with torch.no_grad():
            result = transform(picture.copy())  # which it may change: other encoders see the same picture
    except (Exception, SystemExit) as error:  # another's code
        raise ValueError(f"{named} fails: {type(error).__name__}: {error}") from error
    if not isinstance(result, torch.Tensor) or not result.dtype.is_floating_point:
        kind = f"tensor of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(f"{named} gives a {kind}, not a float tensor (3, height, width)")
    shape = tuple(result.shape)
    if len(shape) != 3 or shape[0] != 3 or not 0 < min(shape) <= max(shape) <= MAX_IMAGE_SIZE:
        raise ValueError(f"{named} gives a tensor {shape}, not (3, height, width)")
    array: NDArray[np.float32] = np.ascontiguousarray(result.detach().cpu().float().numpy())
    if not np.isfinite(array).all():
        raise ValueError(f"{named} gives numbers that are not finite")
    return array
