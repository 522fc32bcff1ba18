"""Networks of encoders: a backbone below its head, and one with a map after it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from migrator.trainer.encoders.programs import Program
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing

if TYPE_CHECKING:
    from migrator.trainer.encoders.manifest import Head
    from migrator.trainer.maps import Map


class EmbeddingNet(nn.Module):
    """Backbone, then (for the head `projection`) Linear(d -> D, no bias) and BatchNorm1d(D): AdvBCT's model.

    forward: (n, 3, H, W) normalised float -> (n, D) embeddings, not yet of unit length.
    """

    def __init__(self, backbone: nn.Module, *, width: int, dim: int, head: Head = "projection") -> None:
        super().__init__()
        self.head = head
        self.dim = dim
        self.backbone = backbone
        if head == "projection":
            self.projection: nn.Module = nn.Linear(width, dim, bias=False)
            self.norm: nn.Module = nn.BatchNorm1d(dim)
        else:
            self.projection = nn.Identity()
            self.norm = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # noqa: D102
        embeddings: torch.Tensor = self.norm(self.projection(self.backbone(images)))
        return embeddings


class MappedNet(nn.Module):
    """A finished network with a map after it: what it embeds is map(normalised embedding of `base`).

    forward: (n, 3, H, W) normalised float -> (n, D) embeddings, not yet of unit length.
    """

    def __init__(self, base: EmbeddingNet, fitted: Map) -> None:
        super().__init__()
        self.head = base.head
        self.dim = fitted.outputs
        self.base = base
        self.map = fitted

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # noqa: D102
        embeddings: torch.Tensor = self.map(F.normalize(self.base(images).float()))
        return embeddings


def require_finite(model: nn.Module, named: str) -> None:
    """Raises EncoderProblem where a weight is not a finite number; `named` is what messages call the weights."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise EncoderProblem(f"weights {named} hold numbers that are not finite, in {name}")


def hash_weights(model: nn.Module) -> str:
    """Hash of names, types, shapes and values, so that it is the same for every file format that holds them.

    Of a program it is that of its file's bytes.
    """
    state, program = model.state_dict(), program_in(model)
    if program is not None and not state:
        return program.sha256
    digest = hashlib.sha256()
    if program is not None:
        digest.update(f"program {program.sha256}\n".encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def program_in(model: nn.Module) -> Program | None:
    """The exported program that a network runs, if any."""
    return next((part for part in model.modules() if isinstance(part, Program)), None)
