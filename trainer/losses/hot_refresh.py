"""`hot_refresh`: contrast with the old vectors, without labels if need be (RACT, https://arxiv.org/abs/2201.09724)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingProblem
from trainer.losses import LossSettings
from trainer.losses.arcface import ArcFace
from trainer.old_space import OldSpace

HARDEST = 10
"""Negatives of each kind that count, per image."""


class Contrast(nn.Module):
    """Cross entropy of an image's own old vector against the hardest negatives, of the old batch and of the new.

    L = -log( exp(f.o / t) / (exp(f.o / t) + sum exp(f.o' / t) + sum exp(f.f' / t)) )

    f and o are an image's new and old vector, o' and f' those of other images, each sum over the 10 greatest; images of
    the same known class are no negatives. Source: Hot-Refresh, regression-alleviating compatible training. Where there
    are no labels, every other image is a negative, be it of the same thing or not: nobody knows better. The temperature
    is `LossSettings.temperature`; published code has 0.01, at which the self-test suffers.
    """

    def __init__(self, *, temperature: float, labelled: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.labelled = labelled

    def forward(self, features: Tensor, labels: Tensor, old: Tensor) -> Tensor:
        """Mean loss of features (B, D), of any length, and old vectors (B, D)."""
        new, old = F.normalize(features), F.normalize(old)
        same = torch.eye(len(new), dtype=torch.bool, device=new.device)
        if self.labelled:
            same = labels[:, None] == labels
        towards_old, towards_new = new @ old.T, new @ new.T
        count = min(HARDEST, len(new))
        negatives = [
            similarity.masked_fill(same, -1e4).topk(count, dim=1).values for similarity in (towards_old, towards_new)
        ]
        logits = torch.cat([towards_old.diagonal()[:, None], *negatives], dim=1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(new), dtype=torch.int64, device=new.device))


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
    """The method as `settings` have it."""
    if old is None:
        raise TrainingProblem(
            "method hot_refresh needs the old encoder: declare old_encoder, or set method to independent"
        )
    classification = None
    if settings.labelled:
        classification = ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin)
    return HotRefresh(classification, Contrast(temperature=settings.temperature, labelled=settings.labelled))
