"""`advbct`: adversarial backward-compatible training (AdvBCT, https://arxiv.org/abs/2305.02610)."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.errors import TrainingProblem
from trainer.losses import LossSettings
from trainer.losses.adversarial import AdversarialAlignment
from trainer.losses.arcface import ArcFace, Softmax
from trainer.losses.boundary import ElasticBoundary
from trainer.old_space import OldSpace


class AdvBCT(nn.Module):
    """Classification + boundary + adversarial alignment, whose weight decays over the epochs (section 3.5)."""

    def __init__(
        self,
        classification: nn.Module,
        boundary: ElasticBoundary,
        adversarial: AdversarialAlignment,
        *,
        boundary_weight: float,
        adversarial_weight: float,
        decay: bool,
        spring: bool,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.boundary = boundary
        self.adversarial = adversarial
        self.boundary_weight = boundary_weight
        self.adversarial_weight = adversarial_weight
        self.decay = decay
        self.spring = spring

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The three terms, weighted, and `slack`, which only moves the radii."""
        weight = self.adversarial_weight * (remaining if self.decay else 1.0)
        terms = {
            "classification": self.classification(features, labels),
            "boundary": self.boundary_weight * self.boundary(features, labels),
            "adversarial": weight * self.adversarial(features, old, progress=progress),
        }
        if self.spring:
            terms["slack"] = self.boundary_weight * self.boundary.slack(labels)
        return terms


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> AdvBCT:
    """The method as `settings` have it; the published recipe (`reference`) has plain softmax and no spring."""
    if old is None:
        raise TrainingProblem("method advbct needs the old encoder: declare old_encoder, or set method to independent")
    boundary = ElasticBoundary(old, limit=settings.radius_limit)
    classification: nn.Module
    if settings.reference:
        classification = Softmax(dim, classes)
    else:
        classification = ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin)
        if settings.start_from_centres:
            # From random directions, a class may be gathered far from its ball, with other classes in between.
            classification.start_from(boundary.centres, boundary.known)
    return AdvBCT(
        classification,
        boundary,
        AdversarialAlignment(
            dim,
            norm=settings.discriminator_norm,
            features=settings.adversarial_features,
            reference=settings.reference,
        ),
        boundary_weight=settings.boundary_weight,
        adversarial_weight=settings.adversarial_weight,
        decay=settings.adversarial_decay,
        spring=settings.spring and not settings.reference,
    )
