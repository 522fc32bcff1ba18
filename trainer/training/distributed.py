"""One training on several devices or machines: started by `torchrun` or `accelerate launch`, one process each.

The processes share each batch. What a loss compares within a batch (negatives, classes, means over violations) spans
all of it, and so do the statistics of batch norms; so several processes train what one would with the same batch.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from migrator.trainer.errors import TrainingProblem
from migrator.trainer.torchvision_cpu import import_timm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_WAIT = timedelta(days=2)
"""Others wait for the first process while it prepares images; if it dies, the launcher ends them all."""


def is_first_process() -> bool:
    """Whether this process is the only one or the first of several: the one that reads, writes and reports.

    Read from the launchers' environment variables, since torch.distributed is not set up yet.
    """
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def accelerator(device: str, *, trackers: Sequence[str] = (), folder: Path | None = None) -> Any:
    """Accelerate's handle on devices and processes. Raises TrainingProblem where they are unavailable.

    `trackers` are names of Accelerate's trackers (`tensorboard`, `wandb`), which write below `folder`.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs

    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingProblem("device is cuda but this machine offers none: set train.device to auto or cpu")
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in available:
            raise TrainingProblem(
                f"tracker {tracker} is not there (available: {', '.join(available) or 'none'}): install its package "
                "(`pip install tensorboard`), or remove it from train.trackers"
            )
    try:
        return Accelerator(
            # Without this, accelerate on a machine without GPU takes each of several processes for the only one.
            cpu=device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="no",
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=MAX_WAIT)],
        )
    except ValueError as error:
        # accelerate fixes the device once for a process.
        raise TrainingProblem(f"device {device} cannot be used in this process: {error}") from error


def broadcast(handle: Any, what: Literal["train", "leave"]) -> None:
    """Lets the other processes continue, once all that they need lies in the run folder."""
    if handle.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list([what])


def receive(handle: Any) -> str:
    """What the first process broadcasts: `train` or `leave`."""
    from accelerate.utils import broadcast_object_list

    message = ["leave"]
    if handle.num_processes > 1:
        broadcast_object_list(message)
    return message[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        ctx.count = len(part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Every process computes the same loss of the same whole batch, so each has the gradient of its part already.
        # DistributedDataParallel will divide by the number of processes what here belongs to one of them alone.
        own = slice(dist.get_rank() * ctx.count, (dist.get_rank() + 1) * ctx.count)
        return dist.get_world_size() * grads[0][own]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        # Each process's part counts in the sum of every process.
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def gathered(part: Tensor) -> Tensor:
    """The whole batch (B, ...) from each process's part (b, ...), in the order of the processes; itself where alone.

    Gradients flow to one's own part, for a loss that every process computes alike of the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return part
    whole: Tensor = _Gather.apply(part)
    return whole


def share_batch_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms whose statistics span the parts of all processes. Names of its state stay.

    On CUDA these are torch's SyncBatchNorm, which has no CPU form; elsewhere the same in plain torch.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return model
    if device.type == "cuda":
        converted: nn.Module = import_timm().layers.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = type(module)
            module.__class__ = type(f"Shared{kind.__name__}", (_SharedBatchNorm, kind), {})
    return model


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Before a batch norm among a class's bases: in training its statistics span all processes."""

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features)
        axes = [axis for axis in range(features.ndim) if axis != 1]
        shape = [1, -1] + [1] * (features.ndim - 2)
        # Every process holds as many.
        count = features.numel() // features.shape[1] * dist.get_world_size()
        mean = _Sum.apply(features.sum(axes)) / count
        centred = features - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                unbiased = variance * (count / max(count - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        result: Tensor = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        if hasattr(self, "act"):  # timm's batch norms carry dropout and activation in them
            result = self.act(self.drop(result))  # type: ignore[operator]
        return result
