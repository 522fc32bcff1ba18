"""The settings of a training run, checked together."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from migrator.trainer.errors import TrainingProblem
from migrator.trainer.maps import POST_HOC
from migrator.trainer.methods.registry import METHODS, LossSettings

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images are trained on, and how they are drawn."""

    validation: float = 0.1
    """Share of the images held out; 0 for none."""
    max_excluded: float = 0.1
    """Share of the images that may be excluded because they are unreadable."""
    pseudo_classes: int | None = None
    """Without labels: as many classes, found by k-means over the old vectors."""
    class_balanced: bool = False
    """Draw classes equally often, however many images they have."""
    flip: bool = False
    """Mirror half of the images: right for products, wrong for digits."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings:
    """Steps of the optimiser."""

    epochs: int = 10
    batch_size: int = 128
    """Images that one step of the optimiser sees, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step, one after the other in memory. Batch norms and in-batch negatives see one at a time."""
    lr: float = 0.002
    weight_decay: float = 0.01
    bf16: bool = False
    """Run the encoder in bfloat16; losses stay in float32."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What does not decide the outcome, beyond the last bits: it may change when a run is resumed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    """Compile the encoder with torch.compile: minutes at the start, faster steps."""
    image_threads: int = 4
    cache: Path | None = None
    """Folder of prepared images, shared between runs (default: in the run folder)."""
    cache_gib: float = 50.0
    keep_checkpoints: int = 2
    checkpoint_minutes: float = 10.0
    """A checkpoint is written at the end of each epoch, and within it as often as this."""
    trackers: tuple[str, ...] = ()
    """Accelerate's trackers that receive every report, such as tensorboard."""


@dataclass(frozen=True, kw_only=True)
class FitSettings(LossSettings, DataSettings, OptimisationSettings, RunSettings):
    """How to train. The defaults were chosen by measurement: docs/explanation/advbct.md has the table."""

    method: str = "advbct"
    old_classifier: Path | None = None
    """For `bct`: the classifier.safetensors that the old encoder's training left."""
    upper_bound: float | None = None
    """mAP@100 of an independent encoder's self-test on the same split, which P_1 is measured against if it is known."""

    def __post_init__(self) -> None:
        shares = ("validation", "max_excluded", "radius_quantile")
        counts = ("epochs", "batch_size", "accumulate", "keep_checkpoints", "image_threads")
        positive = ("lr", "arcface_scale", "radius_limit", "temperature", "checkpoint_minutes", "cache_gib")
        weights = ("boundary_weight", "adversarial_weight", "anchor_weight", "influence_weight")
        not_negative = ("weight_decay", "arcface_margin", "seed", *weights)
        problems = [f"{n} must be from 0 to 1" for n in shares if not 0 <= getattr(self, n) <= 1]
        problems += [f"{n} must be at least 1" for n in counts if getattr(self, n) < 1]
        problems += [f"{n} must be above 0" for n in positive if not 0 < getattr(self, n) < math.inf]
        problems += [f"{n} must be 0 or more" for n in not_negative if not 0 <= getattr(self, n) < math.inf]
        if self.validation > 0.9:
            problems.append("validation must leave a tenth of the images to train on")
        if self.batch_size == 1:
            problems.append("batch_size must be at least 2")
        if self.upper_bound is not None and not 0 < self.upper_bound <= 1:
            problems.append("upper_bound must be above 0 and at most 1")
        if self.pseudo_classes is not None and self.pseudo_classes < 2:
            problems.append("pseudo_classes must be at least 2")
        if self.method not in (*METHODS, *POST_HOC):
            problems.append(f"method must be one of {', '.join((*METHODS, *POST_HOC))}")
        if problems:
            raise TrainingProblem("training settings: " + "; ".join(problems))

    def plain(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values

    def resolved(self) -> FitSettings:
        """Itself, or with the numbers of the published recipe where `reference` asks for it."""
        if not self.reference:
            return self
        return replace(
            self,
            lr=0.1,
            weight_decay=5e-4,
            boundary_weight=1.0,
            adversarial_weight=1.0,
            anchor_weight=0.0,
            radius_quantile=1.0,
            radius_limit=1.0,
        )
