"""AdvBCT's losses as one writes them down from the paper: what the trainer's are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from migrator.trainer.losses.adversarial import GradientReversal, reversal_strength
from migrator.trainer.old_space import OldSpace


class Published(nn.Module):
    """Softmax, a boundary sample by sample, a discriminator with BatchNorm on the new and the old batch apart.

    Source: AdvBCT, https://arxiv.org/abs/2305.02610, section 3.
    """

    centres: Tensor
    radii: Tensor

    def __init__(self, space: OldSpace, dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, len(space.radii), bias=False)
        self.discriminator = nn.Sequential(
            nn.Linear(dim, 100), nn.BatchNorm1d(100), nn.ReLU(inplace=True), nn.Linear(100, 2)
        )
        self.w = nn.Parameter(torch.empty(len(space.radii)).uniform_(-1, 1))
        self.register_buffer("centres", torch.from_numpy(space.centres))
        self.register_buffer("radii", torch.from_numpy(space.radii))

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        return {
            "classification": F.cross_entropy(self.classifier(features), labels),
            "boundary": self.boundary(F.normalize(features), labels),
            "adversarial": remaining * self.adversarial(features, old, progress),
        }

    def boundary(self, features: Tensor, labels: Tensor) -> Tensor:
        total = features.new_zeros(())
        violating = 0
        for feature, label in zip(features, labels, strict=True):
            known = label.item()
            radius = self.radii[known] + (1.0 - self.radii[known]) * torch.sigmoid(self.w[known])
            distance = torch.norm(feature - self.centres[known])
            if distance > radius:
                total = total + distance - radius
                violating += 1
        return total / max(violating, 1)

    def adversarial(self, features: Tensor, old: Tensor, progress: float) -> Tensor:
        reversed_ = GradientReversal.apply(features, reversal_strength(progress))
        new, other = self.discriminator(reversed_), self.discriminator(old)
        zeros = torch.zeros(len(new), dtype=torch.long, device=new.device)
        return F.cross_entropy(torch.cat([new, other]), torch.cat([zeros, zeros + 1]))
