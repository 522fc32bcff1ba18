"""Progress reports of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Progress:
    """Where training stands: images and old vectors prepared, or steps of an epoch done (stage `train`)."""

    stage: Literal["images", "old vectors", "train"]
    epoch: int
    epochs: int
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    validation: Mapping[str, float] = field(default_factory=dict)
    """mAP@100 by name, with the last report of an epoch."""
