"""`hot_refresh`: contrast with the old vectors, without labels if need be (RACT, https://arxiv.org/abs/2201.09724)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from migrator.trainer.losses.arcface import ArcFace
from migrator.trainer.losses.contrast import Contrast

if TYPE_CHECKING:
    from migrator.trainer.methods.registry import LossSettings
    from migrator.trainer.old_space import OldSpace


class HotRefresh(nn.Module):
    """Contrast, with ArcFace beside it where there are labels."""

    def __init__(self, classification: ArcFace | None, contrast: Contrast) -> None:
        super().__init__()
        self.classification = classification
        self.contrast = contrast

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The terms by name."""
        terms = {"contrast": self.contrast(features, labels, old)}
        if self.classification is not None:
            terms["classification"] = self.classification(features, labels)
        return terms


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> HotRefresh:
    """The method as `settings` have it, for D = `dim` and C = `classes`."""
    assert old is not None  # build_objective asks for it
    classification = None
    if settings.labelled:
        classification = ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin)
    return HotRefresh(classification, Contrast(temperature=settings.temperature, labelled=settings.labelled))
