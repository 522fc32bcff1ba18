"""The influence loss: what classified the old embeddings classifies the new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from migrator.trainer.old_space import OldSpace


class Influence(nn.Module):
    """Classification of new embeddings by what classified the old ones, which is frozen: the influence loss.

    L = cross entropy of s cos(f, w_c), over the classes c that have a direction w_c: the old classifier's where it
    knows the class, else the centre of the class's old vectors, as in UniBCT (https://arxiv.org/abs/2203.01583).
    There is no margin: the old directions cannot give way. Samples of classes without a direction are skipped.

    Args:
        old: Centres (C, D) of the old space, and the directions of the old classifier where it is there.
        scale: s, by which the cosines are multiplied.

    Source:
        BCT, https://arxiv.org/abs/2003.11942, section 3.3, equation 5.
    """

    directions: Tensor
    known: Tensor

    def __init__(self, old: OldSpace, *, scale: float) -> None:
        super().__init__()
        self.scale = scale
        directions, known = old.centres, old.known
        if old.classifier is not None:
            has_row = np.asarray(np.isfinite(old.classifier).all(axis=1))
            directions = np.where(has_row[:, None], np.nan_to_num(old.classifier), directions)
            known = known | has_row
        self.register_buffer("directions", F.normalize(torch.from_numpy(directions.astype(np.float32))))  # (C, D)
        self.register_buffer("known", torch.from_numpy(known))  # (C,)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the samples whose class has a direction.

        Args:
            features: (B, D) embeddings of any length.
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar; 0 where no class has a direction.
        """
        logits = self.scale * F.linear(F.normalize(features), self.directions.to(features.dtype))
        logits = logits.masked_fill(~self.known, -1e9)
        known = self.known[labels]
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.where(known, losses, 0).sum() / known.sum().clamp(min=1)
