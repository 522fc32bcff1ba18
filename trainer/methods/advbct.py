"""`advbct`: adversarial backward-compatible training (AdvBCT, https://arxiv.org/abs/2305.02610)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from migrator.trainer.losses.adversarial import AdversarialAlignment
from migrator.trainer.losses.arcface import ArcFace, Softmax
from migrator.trainer.losses.boundary import ElasticBoundary
from migrator.trainer.losses.contrast import Contrast

if TYPE_CHECKING:
    from migrator.trainer.methods.registry import LossSettings
    from migrator.trainer.old_space import OldSpace


class AdvBCT(nn.Module):
    """Classification + boundary + adversarial alignment, whose weight decays over the epochs (section 3.5), + anchor.

    The paper's terms align class by class and distribution by distribution. The anchor is ours: it draws each image's
    new vector to its own old one against the hardest others, as `hot_refresh` does, which decides where classes are
    small or not those of the queries. docs/explanation/advbct.md has what it is worth.
    """

    def __init__(
        self,
        classification: nn.Module,
        boundary: ElasticBoundary,
        adversarial: AdversarialAlignment,
        anchor: Contrast | None,
        *,
        boundary_weight: float,
        adversarial_weight: float,
        anchor_weight: float,
        spring: bool,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.boundary = boundary
        self.adversarial = adversarial
        self.anchor = anchor
        self.anchor_weight = anchor_weight
        self.boundary_weight = boundary_weight
        self.adversarial_weight = adversarial_weight
        self.spring = spring

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The terms, weighted, and `slack`, which only moves the radii."""
        terms = {
            "classification": self.classification(features, labels),
            "boundary": self.boundary_weight * self.boundary(features, labels),
            "adversarial": self.adversarial_weight * remaining * self.adversarial(features, old, progress=progress),
        }
        if self.anchor is not None:
            terms["anchor"] = self.anchor_weight * self.anchor(features, labels, old)
        if self.spring:
            terms["slack"] = self.boundary_weight * self.boundary.slack(labels)
        return terms


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> AdvBCT:
    """The method as `settings` have it; the published recipe, `reference`, has plain softmax, no anchor, no spring."""
    assert old is not None  # build_objective asks for it
    boundary = ElasticBoundary(old, limit=settings.radius_limit)
    classification: nn.Module
    if settings.reference:
        classification = Softmax(dim, classes)
    else:
        classification = ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin)
        # From random directions, a class may be gathered far from its ball, with other classes in between.
        classification.start_from(boundary.centres, boundary.known)
    anchor = None
    if settings.anchor_weight and not settings.reference:
        anchor = Contrast(temperature=settings.temperature, labelled=settings.labelled)
    return AdvBCT(
        classification,
        boundary,
        AdversarialAlignment(dim, reference=settings.reference),
        anchor,
        boundary_weight=settings.boundary_weight,
        adversarial_weight=settings.adversarial_weight,
        anchor_weight=settings.anchor_weight,
        spring=not settings.reference,
    )
