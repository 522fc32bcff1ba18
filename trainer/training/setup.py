"""What training works on: a fresh encoder with its losses, its optimiser, and the devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from migrator.trainer.encoders.building import build_model
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.methods.registry import METHODS, build_objective
from migrator.trainer.old_space import OldSpace, measure_old_space
from migrator.trainer.torchvision_cpu import import_timm
from migrator.trainer.training.classifier import read_classifier
from migrator.trainer.training.distributed import gathered, share_batch_statistics

if TYPE_CHECKING:
    from migrator.trainer.encoders.networks import EmbeddingNet
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.training.inputs import Inputs
    from migrator.trainer.training.settings import FitSettings


class Learner(nn.Module):
    """Encoder and losses in one module, so that one wrapper serves several devices and one state dict is saved."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: EmbeddingNet, objective: nn.Module, spec: EncoderSpec, *, bf16: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.bf16 = bf16
        for name in ("mean", "std"):
            value = torch.tensor(getattr(spec.preprocessing, name), dtype=torch.float32) * spec.preprocessing.levels
            self.register_buffer(name, value[:, None, None], persistent=False)

    def embed(self, pixels: Tensor, model: nn.Module | None = None) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, not normalised, by the encoder or by `model`, a part of it."""
        images = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            features: Tensor = (model or self.encoder)(images)
        return features.float()

    def forward(
        self, pixels: Tensor, labels: Tensor, old: Tensor | None, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The weighted loss terms by name, scalars; each over the batch of all processes."""
        features = gathered(self.embed(pixels))
        if old is not None:
            old = gathered(old)
        terms: dict[str, Tensor] = self.objective(
            features, gathered(labels), old, progress=progress, remaining=remaining
        )
        return terms


@dataclass
class Run:
    """Everything that training works on. Its state is `learner` and `optimizer`, nothing else."""

    inputs: Inputs
    spec: EncoderSpec
    settings: FitSettings
    accelerator: Any
    learner: Learner
    wrapped: nn.Module
    optimizer: Any


def setup(inputs: Inputs, spec: EncoderSpec, settings: FitSettings, handle: Any) -> Run:
    """A fresh model, its losses and its optimiser, on the device.

    Raises TrainingProblem where the batch cannot be shared among processes and micro-batches.
    """
    parts = handle.num_processes * settings.accumulate
    if settings.batch_size % parts or settings.batch_size // parts < 2:
        raise TrainingProblem(
            f"a batch of {settings.batch_size} cannot be shared by {handle.num_processes} processes x "
            f"{settings.accumulate} micro-batches: set train.batch_size to a multiple of {parts}, at least {2 * parts}"
        )
    torch.manual_seed(settings.seed)
    old_space = _old_space(inputs, spec, settings)
    objective = build_objective(settings.method, settings, dim=spec.dim, classes=inputs.classes, old=old_space)
    encoder = build_model(spec)
    encoder = share_batch_statistics(encoder, handle.device)  # type: ignore[assignment]
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(encoder, objective, spec, bf16=settings.bf16)
    optimizer = build_optimizer(learner, settings)
    if settings.compile:
        learner.encoder.compile()
    wrapped, optimizer = handle.prepare(learner, optimizer)
    return Run(inputs, spec, settings, handle, learner, wrapped, optimizer)


def _old_space(inputs: Inputs, spec: EncoderSpec, settings: FitSettings) -> OldSpace | None:
    if not METHODS[settings.method].needs_old or inputs.old is None:
        return None
    rows = inputs.train
    space = measure_old_space(
        inputs.old[rows],
        inputs.labels[rows],
        classes=inputs.classes,
        quantile=settings.radius_quantile,
        shrink=not settings.reference,
    )
    if settings.old_classifier is None:
        return space
    return replace(space, classifier=read_classifier(settings.old_classifier, inputs.class_names, spec.dim))


def build_optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """AdamW whose weight decay spares norms, biases and the radii's w_c; SGD that decays everything for `reference`.

    Decay would pull those towards a value that means something else than "small".
    """
    import_timm()
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    exempt, decayed = param_groups_weight_decay(model, settings.weight_decay)
    if settings.reference:
        exempt["params"], decayed["params"] = [], list(model.parameters())
    groups = [decayed, exempt]  # in the order of the checkpoints
    if settings.reference:
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr)
