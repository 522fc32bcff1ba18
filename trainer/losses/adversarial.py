"""Adversarial alignment: a discriminator tells new from old embeddings, and the encoder learns to prevent it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GradientReversal(torch.autograd.Function):
    """Identity forwards, gradient times -alpha backwards (https://arxiv.org/abs/1409.7495, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, alpha: float) -> Tensor:
        """The features as they are."""
        ctx.alpha = alpha
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient turned round; alpha has none."""
        return -ctx.alpha * grads[0], None


def reversal_strength(progress: float) -> float:
    """alpha = 2 / (1 + exp(-10 p)) - 1: 0 at the start of training, close to 1 from the middle on.

    Args:
        progress: p, the share of the training done, 0..1.

    Source:
        Ganin and Lempitsky, https://arxiv.org/abs/1409.7495, with gamma = 10.
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


class AdversarialAlignment(nn.Module):
    """Cross entropy of a discriminator between new and old embeddings, reversed for the encoder.

    Two departures from the paper. The discriminator sees what retrieval sees, embeddings of unit length, scaled by
    sqrt(D) so that a coordinate has unit variance. Its normalisation is LayerNorm: BatchNorm over the new and the old
    batch apart would give both the same mean and scale and so hide what is to be told apart; LayerNorm looks at one
    sample, has no running statistics, and is the same on several devices. `reference` undoes both: features as they
    are, and BatchNorm over each batch apart (which also makes up for old vectors that come at unit length); and it adds
    the means over new and old, as the authors' code does, which is twice the mean over both.

    Args:
        dim: D, length of an embedding.
        hidden: Width of the discriminator's hidden layer.
        reference: Whether to follow the authors' code.

    Source:
        AdvBCT, https://arxiv.org/abs/2305.02610, section 3.3.
    """

    def __init__(self, dim: int, hidden: int = 100, *, reference: bool = False) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)
        self.reference = reference
        norm = nn.BatchNorm1d(hidden) if reference else nn.LayerNorm(hidden)
        self.discriminator = nn.Sequential(nn.Linear(dim, hidden), norm, nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, features: Tensor, old: Tensor, *, progress: float) -> Tensor:
        """Mean loss over new and old embeddings; old ones enter without reversal.

        Args:
            features: (B, D) new embeddings of any length.
            old: (B', D) old vectors.
            progress: Share of the training done, 0..1.

        Returns:
            A scalar.
        """
        is_new = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        is_old = torch.ones(len(old), dtype=torch.int64, device=old.device)
        strength = reversal_strength(progress)
        if self.reference:
            new = GradientReversal.apply(features, strength)
            return F.cross_entropy(self.discriminator(new), is_new) + F.cross_entropy(self.discriminator(old), is_old)
        new = GradientReversal.apply(self.scale * F.normalize(features), strength)
        logits = self.discriminator(torch.cat([new, self.scale * F.normalize(old)]))
        return F.cross_entropy(logits, torch.cat([is_new, is_old]))
