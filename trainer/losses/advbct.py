"""`advbct`: adversarial backward-compatible training (AdvBCT, https://arxiv.org/abs/2305.02610)."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.errors import TrainingProblem
from trainer.losses import LossSettings
from trainer.losses.adversarial import AdversarialAlignment
from trainer.losses.arcface import ArcFace
from trainer.losses.boundary import ElasticBoundary
from trainer.old_space import OldSpace


class AdvBCT(nn.Module):
    """Classification + boundary + adversarial alignment, whose weight decays over the epochs (section 3.5)."""

    def __init__(
        self,
        classification: ArcFace,
        boundary: ElasticBoundary,
        adversarial: AdversarialAlignment,
        *,
        boundary_weight: float,
        adversarial_weight: float,
        spring: bool,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.boundary = boundary
        self.adversarial = adversarial
        self.boundary_weight = boundary_weight
        self.adversarial_weight = adversarial_weight
        self.spring = spring

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The three terms, weighted, and `slack`, which only moves the radii."""
        terms = {
            "classification": self.classification(features, labels),
            "boundary": self.boundary_weight * self.boundary(features, labels),
            "adversarial": self.adversarial_weight * remaining * self.adversarial(features, old, progress=progress),
        }
        if self.spring:
            terms["slack"] = self.boundary_weight * self.boundary.slack(labels)
        return terms


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> AdvBCT:
    """The method as `settings` have it; the published recipe (`reference`) knows no spring on the radii."""
    if old is None:
        raise TrainingProblem("method advbct needs the old encoder: declare old_encoder, or set method to independent")
    classification = ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin)
    boundary = ElasticBoundary(old, limit=settings.radius_limit)
    if not settings.reference:
        # From random directions, classification may gather a class far from its ball, with other classes in between.
        classification.start_from(boundary.centres, boundary.known)
    return AdvBCT(
        classification,
        boundary,
        AdversarialAlignment(dim),
        boundary_weight=settings.boundary_weight,
        adversarial_weight=settings.adversarial_weight,
        spring=not settings.reference,
    )
