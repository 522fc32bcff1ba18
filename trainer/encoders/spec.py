"""An encoder as a user declares it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from migrator.trainer.encoders.architecture import PROGRAMS, display_name
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.factories import MODULE

if TYPE_CHECKING:
    from pathlib import Path

    from migrator.trainer.encoders.manifest import Manifest
    from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing


_MAX_DIM = 65_536


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder as a user declares it.

    `weights` is a file with a state dict in it (`encoders.checkpoints`), or where `arch` is a file, the
    .pt2 or .onnx.
    """

    arch: str
    """A timm name, `module:package.module:factory`, `file:pt2` or `file:onnx`: see `encoders.backbones`."""
    dim: int
    preprocessing: Preprocessing
    weights: Path | None = None
    pretrained: bool = False
    """Take the backbone's weights from timm's hub. Needs the network unless they are cached."""
    folder: Path | None = None
    """Where a factory's module is looked for, before the installed packages."""
    head: Literal["classifier", "none"] | None = None
    """Of a plain timm state dict: its classifier's output, or its pooled features. By default the classifier's where it
    has `dim` outputs."""
    checkpoint_key: str | None = None
    """Which of several state dicts in the file of `weights`, as `encoders.checkpoints.Found.place` names it."""


def refuse_head(spec: EncoderSpec) -> None:
    """Only a plain timm state dict leaves a choice of what the embedding is."""
    if spec.head is not None:
        raise EncoderProblem(
            f"head: {spec.head} is for the state dict of a timm model, which {weights_name(spec)} is not: remove head"
        )


def require_dim(spec: EncoderSpec) -> None:
    """Raises EncoderProblem where `spec.dim` is out of range."""
    if not 1 <= spec.dim <= _MAX_DIM:
        raise EncoderProblem(f"dim {spec.dim} must be from 1 to {_MAX_DIM}")


def require_same_declaration(spec: EncoderSpec, manifest: Manifest) -> None:
    """Raises EncoderMismatch where architecture, dim or preprocessing are not declared as the manifest has them."""
    for name, now, then in (("architecture", spec.arch, manifest.arch), ("dim", spec.dim, manifest.dim)):
        if now != then:
            raise EncoderMismatch(
                f"encoder {manifest.id}: its {name} is declared as {now!r}, but its manifest says {then!r}"
            )
    declared, recorded = asdict(spec.preprocessing), asdict(manifest.preprocessing)
    changed = [
        f"{name} {declared[name]!r} instead of {recorded[name]!r}"
        for name in recorded
        if declared[name] != recorded[name]
    ]
    if changed:
        raise EncoderMismatch(
            f"encoder {manifest.id}: its preprocessing is not that of its manifest: {', '.join(changed)}"
        )


def require_program(spec: EncoderSpec) -> None:
    """Refuses an architecture that is a file without that file, or an encoder made around it."""
    if spec.arch in PROGRAMS:
        suffix = PROGRAMS[spec.arch]
        if spec.weights is None or spec.weights.suffix not in (suffix, ".safetensors"):
            raise EncoderProblem(
                f"{display_name(spec.arch)} has no file: set weights to a {suffix} file, not {spec.weights}"
            )


def weights_name(spec: EncoderSpec) -> str:
    """What messages call the weights: their file, or where else they come from."""
    if spec.weights:
        return repr(str(spec.weights))
    return display_name(spec.arch) if spec.arch.startswith(MODULE) else f"timm's hub for {spec.arch!r}"
