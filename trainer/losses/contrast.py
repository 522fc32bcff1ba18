"""Contrast of an image's new vector with its old one: the term between single images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HARDEST = 10
"""Negatives of each kind that count, per image."""


class Contrast(nn.Module):
    """Cross entropy of an image's own old vector against the hardest negatives, of the old batch and of the new.

    L = -log( exp(f.o / t) / (exp(f.o / t) + sum exp(f.o' / t) + sum exp(f.f' / t)) )

    f and o are an image's new and old vector, o' and f' those of other images, each sum over the 10 greatest; images of
    the same class are no negatives. Without labels every other image is a negative, whatever it shows.

    Args:
        temperature: t. Published code has 0.01, at which the self-test suffers.
        labelled: Whether labels are real.

    Source:
        RACT (Hot-Refresh), https://arxiv.org/abs/2201.09724, regression-alleviating compatible training.
    """

    def __init__(self, *, temperature: float, labelled: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.labelled = labelled

    def forward(self, features: Tensor, labels: Tensor, old: Tensor) -> Tensor:
        """Mean loss over the batch.

        Args:
            features: (B, D) new embeddings of any length.
            labels: (B,) int64; not used where `labelled` is False.
            old: (B, D) old vectors of the same images, of any length.

        Returns:
            A scalar.
        """
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
