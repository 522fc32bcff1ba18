"""The boundary on the angle: a new embedding belongs inside the cone of its class in the old space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from migrator.trainer.old_space import OldSpace


class AngularBoundary(nn.Module):
    """Angle by which new embeddings lie outside the cone that their class's old embeddings fill.

    L = mean over the samples of known classes of max(0, theta(f, c_y) - theta_y). theta_y belongs to the radius of the
    class's ball: a unit vector at distance r from the centre c, not of unit length itself, has
    cos theta = (1 + |c|^2 - r^2) / 2|c|.
    Two departures from the authors' code: it takes the largest angle of a class, which is the radius at quantile 1; and
    it compares cosines, whose slope fades near the centre.

    Args:
        old: Centres (C, D) and radii (C,) of the old space.

    Source:
        LCE, https://arxiv.org/abs/2108.01958, the boundary loss, checked against the authors' code.
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
        """Mean excess over the samples whose class has a cone.

        Args:
            features: (B, D) embeddings of any length.
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar, in radians; 0 where no class has a cone.
        """
        cosine = (F.normalize(features) * self.directions[labels]).sum(dim=1)
        # At +-1 the slope of acos is infinite, and one perfect sample would turn every weight into NaN.
        excess = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos() - self.angles[labels]
        known = self.known[labels]
        return torch.where(known, excess.relu(), 0).sum() / known.sum().clamp(min=1)
