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
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

    from trainer.old_space import OldSpace

# Named by text: listing the methods must not load torch.
METHODS = {
    "advbct": "trainer.losses.advbct",
    "independent": "trainer.losses.independent",
}


class LossSettings(Protocol):
    """What the losses read of the training settings (`FitSettings`, which says what each means)."""

    arcface_scale: Final[float]
    arcface_margin: Final[float]
    boundary_weight: Final[float]
    adversarial_weight: Final[float]
    radius_limit: Final[float]
    reference: Final[bool]


def build_objective(method: str, settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> nn.Module:
    """The loss of `method` for D = `dim` and that many classes. `old` is None where there is no old encoder."""
    objective: nn.Module = importlib.import_module(METHODS[method]).build(settings, dim=dim, classes=classes, old=old)
    return objective
