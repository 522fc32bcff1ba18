"""Alignment of the new class centres with the old ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from migrator.trainer.old_space import OldSpace


class CentreAlignment(nn.Module):
    """Mean of 1 - cos(w_c, c_c) over the classes of the batch that have an old centre c; w are the new class centres.

    The new centres are the weights of the classifier. The authors' code has the squared distance of the unit vectors,
    that is 2 - 2 cos, over all classes. Here only those of the batch count, so that the loss does not fade as the
    number of classes grows.

    Args:
        old: Centres (C, D) of the old space.

    Source:
        LCE, https://arxiv.org/abs/2108.01958, the alignment loss, checked against the authors' code.
    """

    centres: Tensor
    known: Tensor

    def __init__(self, old: OldSpace) -> None:
        super().__init__()
        self.register_buffer("centres", torch.from_numpy(old.centres))  # (C, D)
        self.register_buffer("known", torch.from_numpy(old.known))  # (C,)

    def forward(self, weight: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the classes of the batch that have an old centre.

        Args:
            weight: (C, D), the new centres, of any length.
            labels: (B,) int64 in 0..C-1.

        Returns:
            A scalar; 0 where no class has an old centre.
        """
        classes = labels.unique()
        known = self.known[classes]
        apart = 1 - F.cosine_similarity(weight[classes], self.centres[classes].to(weight.dtype))
        return torch.where(known, apart, 0).sum() / known.sum().clamp(min=1)
