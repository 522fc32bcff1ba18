"""ArcFace, the classification term, and plain softmax, which the published recipe has in its place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ArcFace(nn.Module):
    """Softmax over angles, with an additive margin on the angle to the true class.

    L = -log( exp(s cos(theta_y + m)) / (exp(s cos(theta_y + m)) + sum_{j != y} exp(s cos theta_j)) )

    Beyond theta_y = pi - m, where cos(theta_y + m) would rise again, the target logit keeps falling as
    cos(theta_y) - m sin(m), as the authors' code does.

    Args:
        dim: D, length of an embedding.
        classes: C, number of classes.
        scale: s, by which the cosines are multiplied.
        margin: m, in radians.

    Source:
        ArcFace, https://arxiv.org/abs/1801.07698, equation 3; used in AdvBCT, https://arxiv.org/abs/2305.02610,
        section 3.2.
    """

    def __init__(self, dim: int, classes: int, *, scale: float, margin: float) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)

    @torch.no_grad()
    def start_from(self, centres: Tensor, known: Tensor) -> None:
        """Turns the weights of some classes into given directions; their lengths are kept.

        Args:
            centres: (C, D), the directions, of any length.
            known: (C,) bool, the classes that are turned.
        """
        turned = F.normalize(centres) * self.weight.norm(dim=1, keepdim=True)
        self.weight.copy_(torch.where(known[:, None], turned, self.weight))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the batch.

        Args:
            features: (B, D) embeddings of any length.
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar.
        """
        cosine = F.linear(F.normalize(features), F.normalize(self.weight))  # (B, C)
        target = cosine.gather(1, labels[:, None])
        # At +-1 the slope of acos is infinite, and one perfect sample would turn every weight into NaN.
        theta = target.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        with_margin = torch.where(
            theta <= math.pi - self.margin,
            (theta + self.margin).cos(),
            target - self.margin * math.sin(self.margin),
        )
        return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], with_margin), labels)


class Softmax(nn.Module):
    """Cross entropy of W f, on features as they are: the classification term of the published recipe.

    Args:
        dim: D, length of an embedding.
        classes: C, number of classes.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes, bias=False)

    @property
    def weight(self) -> Tensor:
        """The directions of the classes, (C, D)."""
        return self.linear.weight

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the batch.

        Args:
            features: (B, D) embeddings.
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar.
        """
        return F.cross_entropy(self.linear(features), labels)
