"""`independent`: classification only, for a first encoder and as the upper bound of a compatible one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from migrator.trainer.losses.arcface import ArcFace

if TYPE_CHECKING:
    from migrator.trainer.methods.registry import LossSettings
    from migrator.trainer.old_space import OldSpace


class Independent(nn.Module):
    """ArcFace alone; the vectors cannot be compared with those of another encoder."""

    def __init__(self, classification: ArcFace) -> None:
        super().__init__()
        self.classification = classification

    def forward(
        self, features: Tensor, labels: Tensor, old: Tensor | None, *, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The classification term; the old vectors are not used."""
        return {"classification": self.classification(features, labels)}


def build(settings: LossSettings, *, dim: int, classes: int, old: OldSpace | None) -> Independent:
    """The method as `settings` have it, for D = `dim` and C = `classes`."""
    return Independent(ArcFace(dim, classes, scale=settings.arcface_scale, margin=settings.arcface_margin))
