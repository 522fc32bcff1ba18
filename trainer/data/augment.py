"""Augmentation on tensors, a batch at a time: what is drawn is apart from what is done, so that processes can share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """How each image of a batch is to be seen."""

    shift: Tensor  # (2, B) int64, rows and columns in pixels
    mirrored: Tensor  # (B,) bool

    def part(self, of: slice) -> Views:
        """The views of some of the images."""
        return Views(self.shift[:, of], self.mirrored[of])


def draw_views(count: int, size: tuple[int, int], *, flip: bool, generator: torch.Generator) -> Views:
    """For each image a shift by up to an eighth of its sides, and for half of them a mirror if `flip`."""
    limits = [side // 8 for side in size]
    shift = torch.stack([torch.randint(-limit, limit + 1, (count,), generator=generator) for limit in limits])
    mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    return Views(shift, mirrored)


def augmented(batch: Tensor, views: Views) -> Tensor:
    """The images (B, 3, H, W), of any type, shifted with their edges repeated, then mirrored."""
    rows, columns = (  # (B, H) and (B, W); clamping repeats the edge
        (torch.arange(side) + shift[:, None]).clamp(0, side - 1)
        for side, shift in zip(batch.shape[-2:], views.shift, strict=True)
    )
    columns = torch.where(views.mirrored[:, None], columns.flip(1), columns)
    sample = torch.arange(len(batch))[:, None, None, None]
    channel = torch.arange(3)[None, :, None, None]
    return batch[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
