"""The training methods, by name. A loss is one small file; a method is one small file that adds losses up.

A method is a `torch.nn.Module` with `forward(features, labels, old, *, progress, remaining)`, which returns its
weighted terms by name; what training minimises is their sum:

- features: (B, D) unnormalised embeddings of the new encoder
- labels: (B,) int64 class indices
- old: (B, D) unit-length vectors of the same images from the old encoder, or None where there is no old encoder
- progress: share of the training done, 0..1
- remaining: (E - e + 1) / E in epoch e of E, 1 in the first epoch and 1/E in the last
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from trainer.old_space import OldSpace

# Named by text: listing the methods must not load torch.
METHODS = {
    "advbct": "trainer.losses.advbct",
    "independent": "trainer.losses.independent",
}


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the losses read of the training settings."""

    arcface_scale: float = 30.0
    arcface_margin: float = 0.3  # radians
    boundary_weight: float = 5.0
    adversarial_weight: float = 1.0
    radius_quantile: float = 0.5
    """Which of a class's distances is its radius; 1 for the largest."""
    radius_limit: float = 0.5
    """T of the elastic boundary."""
    reference: bool = False
    """The published recipe: SGD in steps, largest distance as radius, T = 1, equal weights; it needs much data."""


def build_objective(method: str, settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> nn.Module:
    """The loss of `method` for D = `dim` and that many classes. `old` is None where there is no old encoder."""
    objective: nn.Module = importlib.import_module(METHODS[method]).build(settings, dim=dim, classes=classes, old=old)
    return objective
