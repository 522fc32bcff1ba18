"""The elastic boundary: a new embedding belongs inside the ball of its class in the old space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from migrator.trainer.old_space import OldSpace


class ElasticBoundary(nn.Module):
    """Distance by which normalised embeddings lie outside the ball of their class.

    L = mean over the violating samples of ||f_hat - c_y|| - r_y,   r_y = r_c + (T - r_c) sigmoid(w_c)

    c and r_c are the centres and radii of the old space; the learnable w_c moves the radius between r_c and T. Samples
    of classes that the old encoder does not know have no ball and are skipped.

    Args:
        old: Centres (C, D) and radii (C,) of the old space.
        limit: T, a distance on the unit sphere, 0..2.

    Source:
        AdvBCT, https://arxiv.org/abs/2305.02610, section 3.4.
    """

    centres: Tensor
    radii: Tensor
    known: Tensor

    def __init__(self, old: OldSpace, *, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("centres", torch.from_numpy(old.centres))  # (C, D)
        self.register_buffer("radii", torch.from_numpy(old.radii))  # (C,)
        self.register_buffer("known", torch.from_numpy(old.known))  # (C,)
        self.w = nn.Parameter(torch.empty(len(old.radii)).uniform_(-1, 1))

    def elastic_radii(self) -> Tensor:
        """The current radius of each class, (C,)."""
        return self.radii + (self.limit - self.radii) * self.w.sigmoid()

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean excess over the samples outside their ball.

        Args:
            features: (B, D) embeddings of any length.
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar, a distance on the unit sphere; 0 where no sample is outside.
        """
        distance = torch.linalg.vector_norm(F.normalize(features) - self.centres[labels], dim=1)
        excess = distance - self.elastic_radii()[labels]
        violating = (excess > 0) & self.known[labels]
        loss: Tensor = torch.where(violating, excess, 0).sum() / violating.sum().clamp(min=1)
        return loss

    def slack(self, labels: Tensor) -> Tensor:
        """Mean of r_y - r_c over the samples whose class has a ball: the spring that holds the boundary.

        Where T > r_c, the boundary loss alone can only widen a ball. With this term added, classes violated more than
        the average of the batch widen and the others narrow, since the two gradients on the radii cancel in sum. It is
        not in the paper.

        Args:
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar; 0 where no class has a ball.
        """
        known = self.known[labels]
        widened = (self.elastic_radii() - self.radii)[labels]
        return torch.where(known, widened, 0).sum() / known.sum().clamp(min=1)
