"""The training methods, by name.

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

from migrator.trainer.errors import TrainingProblem

if TYPE_CHECKING:
    from torch import nn

    from migrator.trainer.old_space import OldSpace


@dataclass(frozen=True)
class Method:
    """A training method: where it is, and what it cannot do without."""

    module: str
    """Named by text: listing the methods must not load torch."""
    needs_labels: bool
    needs_old: bool


METHODS = {
    "advbct": Method("migrator.trainer.methods.advbct", needs_labels=True, needs_old=True),
    "bct": Method("migrator.trainer.methods.bct", needs_labels=True, needs_old=True),
    "lce": Method("migrator.trainer.methods.lce", needs_labels=True, needs_old=True),
    "hot_refresh": Method("migrator.trainer.methods.hot_refresh", needs_labels=False, needs_old=True),
    "independent": Method("migrator.trainer.methods.independent", needs_labels=True, needs_old=False),
}


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the losses read of the training settings."""

    arcface_scale: float = 30.0
    arcface_margin: float = 0.3  # radians
    boundary_weight: float = 2.0
    adversarial_weight: float = 1.0
    anchor_weight: float = 1.0
    """Of the contrast between an image's new and old vector (`advbct`)."""
    radius_quantile: float = 0.5
    """Which of a class's distances is its radius; 1 for the largest."""
    radius_limit: float = 0.5
    """T of the elastic boundary."""
    influence_weight: float = 1.0
    """Of the loss through the old classifier (`bct`)."""
    temperature: float = 0.05
    """Of the contrast (`hot_refresh`, and the anchor of `advbct`)."""
    labelled: bool = True
    """Whether the images have labels; without, `hot_refresh` contrasts every two images."""
    reference: bool = False
    """The published recipe: SGD in steps, largest distance as radius, T = 1, equal weights; it needs much data."""


def old_is_missing(method: str) -> TrainingProblem:
    """The problem that a compatible method is set and there is no old encoder."""
    return TrainingProblem(f"method {method} needs the old encoder: declare old_encoder, or set method to independent")


def build_objective(method: str, settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> nn.Module:
    """The loss that a method minimises, as a module with the `forward` described above.

    Args:
        method: A key of `METHODS`.
        settings: Weights and parameters of the losses.
        dim: D, length of an embedding.
        classes: C, number of classes.
        old: Centres (C, D) and radii (C,) of the old space; None where there is no old encoder.

    Raises:
        TrainingProblem: The method needs an old encoder and there is none.
    """
    if METHODS[method].needs_old and old is None:
        raise old_is_missing(method)
    module = importlib.import_module(METHODS[method].module)
    objective: nn.Module = module.build(settings, dim=dim, classes=classes, old=old)
    return objective
