"""Writing an encoder: its weights, and its manifest beside them."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from migrator.trainer.encoders.encoder import Encoder, fingerprint_of, manifest_of
from migrator.trainer.encoders.manifest import Manifest, manifest_path
from migrator.trainer.encoders.networks import EmbeddingNet, MappedNet, program_in, require_finite
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.files import write_whole
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing

if TYPE_CHECKING:
    from pathlib import Path

    from migrator.trainer.encoders.programs import Program
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.maps import Map


def save_mapped_encoder(base: Encoder, base_spec: EncoderSpec, fitted: Map, dim: int, path: Path) -> Manifest:
    """Writes `base` with a map after it as one encoder of `dim` numbers, as `save_encoder` does. Returns its manifest.

    `load_encoder` gives it back from `path`, with the arch and preprocessing of `base_spec`. Raises EncoderProblem.
    """
    if (fitted.inputs, fitted.outputs) != (base.dim, dim):
        raise EncoderProblem(
            f"a map from {fitted.inputs} to {fitted.outputs} numbers does not lead from encoder {base.id} ({base.dim}) "
            f"to {dim}: fit it on vectors of both"
        )
    assert isinstance(base.model, EmbeddingNet)  # load_base gives no other
    return save_encoder(MappedNet(base.model, fitted), replace(base_spec, dim=dim), path)


def save_encoder(model: EmbeddingNet | MappedNet, spec: EncoderSpec, path: Path) -> Manifest:
    """Writes the weights to `path` (.safetensors) and the manifest beside them (.json), each whole or not at all.

    A .pt2 or .onnx file that the model runs is copied beside them, under the same name but for its suffix. The manifest
    goes last: after a crash before it, loading meets weights without a manifest or with one that refuses them.
    Raises EncoderProblem where the model gives no usable vector or the files cannot be written.
    """
    from safetensors.torch import save

    if path.suffix != ".safetensors":
        raise EncoderProblem(f"encoder cannot be written to {str(path)!r}: give it the suffix .safetensors")
    frozen: EmbeddingNet | MappedNet = copy.deepcopy(model).float().cpu().eval()
    require_finite(frozen, "to be saved")
    fingerprint = fingerprint_of(frozen, spec.preprocessing, torch.device("cpu"))
    manifest = manifest_of(spec, frozen, fingerprint)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in frozen.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (program := program_in(frozen)) is not None:
            _copy_program(program, path.with_suffix(program.path.suffix))
        write_whole(path, save(state, metadata={"format": "pt", "encoder": manifest.id}))
        write_whole(manifest_path(path), manifest.to_json().encode())
    except OSError as error:
        raise EncoderProblem(f"encoder cannot be written to {str(path)!r}: {error.strerror}") from error
    return manifest


def _copy_program(program: Program, path: Path) -> None:
    if path.exists() and path.samefile(program.path):
        return
    data = program.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != program.sha256:
        raise EncoderMismatch(f"{program.named} was changed while it was in use: put it back and try again")
    write_whole(path, data)
