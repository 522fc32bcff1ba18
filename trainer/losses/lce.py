"""`lce`: aligned class centres and a boundary on the angle (LCE, https://arxiv.org/abs/2108.01958)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from migrator.trainer.losses import LossSettings
from migrator.trainer.losses.arcface import ArcFace
from migrator.trainer.old_space import OldSpace


class CentreAlignment(nn.Module):
    """Mean of 1 - cos(w_c, c_c) over the classes of the batch that have an old centre c; w are the new class centres.

    The new centres are the weights of the classifier. Source: LCE, the alignment loss, checked against the authors'
    code, which has the squared distance of the unit vectors, that is 2 - 2 cos, over all classes. Here only those of
    the batch count, so that the loss does not fade as classes become many.
    """

    centres: Tensor
    known: Tensor

    def __init__(self, old: OldSpace) -> None:
        super().__init__()
        self.register_buffer("centres", torch.from_numpy(old.centres))  # (C, D)
        self.register_buffer("known", torch.from_numpy(old.known))  # (C,)

    def forward(self, weight: Tensor, labels: Tensor) -> Tensor:
        """Loss of new centres (C, D) for labels (B,); 0 where no class is known."""
        classes = labels.unique()
        known = self.known[classes]
        apart = 1 - F.cosine_similarity(weight[classes], self.centres[classes].to(weight.dtype))
        return torch.where(known, apart, 0).sum() / known.sum().clamp(min=1)


class AngularBoundary(nn.Module):
    """Angle by which new embeddings lie outside the cone that their class's old embeddings fill.

    L = mean over the samples of known classes of max(0, theta(f, c_y) - theta_y). theta_y belongs to the radius of the
    class's ball: a unit vector at distance r from the centre c, not of unit length itself, has
    cos theta = (1 + |c|^2 - r^2) / 2|c|.
    Source: LCE, the boundary loss, checked against the authors' code, which departs in two ways: it takes the largest
    angle of a class, which is the radius at quantile 1; and it compares cosines, whose slope fades near the centre.
    """

    directions: Tensor
    angles: Tensor
    known: Tensor

    def __init__(self, old: OldSpace) -> None:
        super().__init__()
        length = np.linalg.norm(old.centres, axis=1)
        cosine = (1 + length**2 - old.radii**2) / (2 * np.maximum(length, 1e-6))
        self.register_buffer("directions", F.normalize(torch.from_numpy(old.centres)))  # (C, D)
        self.register_buffer("angles", torch.from_numpy(np.arccos(cosine.clip(-1, 1)).astype(np.float32)))  # (C,)
        self.register_buffer("known", torch.from_numpy(old.known))  # (C,)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean excess, in radians, of those of features (B, D) whose class is known; 0 where none is."""
        cosine = (F.normalize(features) * self.directions[labels]).sum(dim=1)
        # At +-1 the slope of acos is infinite, and one perfect sample would turn every weight into NaN.
        excess = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos() - self.angles[labels]
        known = self.known[labels]
        return torch.where(known, excess.relu(), 0).sum() / known.sum().clamp(min=1)


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
    """The method as `settings` have it."""
    assert old is not None  # build_objective asks for it
    return LCE(
        ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin),
        CentreAlignment(old),
        AngularBoundary(old),
        boundary_weight=settings.boundary_weight,
    )
