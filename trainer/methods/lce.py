"""`lce`: aligned class centres and a boundary on the angle (LCE, https://arxiv.org/abs/2108.01958)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from migrator.trainer.losses.angular_boundary import AngularBoundary
from migrator.trainer.losses.arcface import ArcFace
from migrator.trainer.losses.centre_alignment import CentreAlignment

if TYPE_CHECKING:
    from migrator.trainer.methods.registry import LossSettings
    from migrator.trainer.old_space import OldSpace


class LCE(nn.Module):
    """ArcFace + centre alignment + angular boundary."""

    def __init__(
        self, classification: ArcFace, alignment: CentreAlignment, boundary: AngularBoundary, *, boundary_weight: float
    ) -> None:
        super().__init__()
        self.classification = classification
        self.alignment = alignment
        self.boundary = boundary
        self.boundary_weight = boundary_weight

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The three terms, weighted; the old vectors count through their classes only."""
        return {
            "classification": self.classification(features, labels),
            "alignment": self.boundary_weight * self.alignment(self.classification.weight, labels),
            "boundary": self.boundary_weight * self.boundary(features, labels),
        }


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> LCE:
    """The method as `settings` have it, for D = `dim` and C = `classes`."""
    assert old is not None  # build_objective asks for it
    return LCE(
        ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin),
        CentreAlignment(old),
        AngularBoundary(old),
        boundary_weight=settings.boundary_weight,
    )
