"""`bct`: backward-compatible training through the old classifier (BCT, https://arxiv.org/abs/2003.11942)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from migrator.trainer.losses.arcface import ArcFace
from migrator.trainer.losses.influence import Influence

if TYPE_CHECKING:
    from migrator.trainer.methods.registry import LossSettings
    from migrator.trainer.old_space import OldSpace


class BCT(nn.Module):
    """ArcFace + influence."""

    def __init__(self, classification: ArcFace, influence: Influence, *, influence_weight: float) -> None:
        super().__init__()
        self.classification = classification
        self.influence = influence
        self.influence_weight = influence_weight

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """Both terms, weighted; the old vectors count through their classes only."""
        return {
            "classification": self.classification(features, labels),
            "influence": self.influence_weight * self.influence(features, labels),
        }


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> BCT:
    """The method as `settings` have it, for D = `dim` and C = `classes`."""
    assert old is not None  # build_objective asks for it
    return BCT(
        ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin),
        Influence(old, scale=settings.arcface_scale),
        influence_weight=settings.influence_weight,
    )
