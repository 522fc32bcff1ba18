"""Loading an encoder: its weights into its network, checked against its manifest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from migrator.trainer.encoders.architecture import PROGRAMS, display_name
from migrator.trainer.encoders.building import (
    bare_network,
    create_backbone,
    feature_width,
    open_device,
    require_features,
)
from migrator.trainer.encoders.checkpoints import Network, advice, find_weights, is_needed, kind, places, state_dicts
from migrator.trainer.encoders.encoder import Encoder, fingerprint_of, manifest_of
from migrator.trainer.encoders.manifest import FINGERPRINT_AGREEMENT, Head, Manifest, read_manifest
from migrator.trainer.encoders.networks import EmbeddingNet, MappedNet, hash_weights, require_finite
from migrator.trainer.encoders.spec import (
    EncoderSpec,
    refuse_head,
    require_dim,
    require_program,
    require_same_declaration,
    weights_name,
)
from migrator.trainer.encoders.timm_models import TimmLayout, timm_layout
from migrator.trainer.encoders.weights_file import read_weights
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.factories import MODULE
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing
from migrator.trainer.maps import Map
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping


def load_encoder(spec: EncoderSpec, *, expected: Manifest | None = None, device: str = "auto") -> Encoder:
    """The encoder of `spec`, checked against `expected`, or else against the manifest beside its weights, if any.

    Weights are either migrator's (`backbone.*`, `projection.weight`, `norm.*`; with a map `base.*` and `map.*`), or a
    plain state dict of the timm model or of the factory's module, or a program. Of a plain timm one the classifier
    layer gives the embedding where it has `dim` outputs, else the pooled features do, which must then be `dim` wide.
    `device` is `auto` (CUDA where available), `cpu`, `cuda` or `cuda:1`.

    Raises EncoderMismatch where the encoder does not match the manifest, EncoderProblem where it cannot be loaded.
    """
    require_dim(spec)
    manifest = expected or (read_manifest(spec.weights) if spec.weights else None)
    if manifest is not None:
        require_same_declaration(spec, manifest)
    target = open_device(device)
    model, taken = _load_model(spec, target)
    return _checked(model, spec, manifest, target, taken)


def load_base(spec: EncoderSpec, *, device: str = "auto") -> Encoder:
    """The encoder of `spec` with vectors as long as its weights make them, whatever `spec.dim`: what a map starts from.

    Raises EncoderProblem and EncoderMismatch as `load_encoder` does, and for weights that hold a map already.
    """
    manifest = read_manifest(spec.weights) if spec.weights else None
    if manifest is not None:
        spec = replace(spec, dim=manifest.dim)
        require_same_declaration(spec, manifest)
    target = open_device(device)
    model, taken = _load_model(spec, target, any_dim=True)
    if isinstance(model, MappedNet):
        raise EncoderProblem(f"weights {weights_name(spec)} hold a map already: give those of the encoder below it")
    return _checked(model, replace(spec, dim=model.dim), manifest, target, taken)


def _checked(
    model: EmbeddingNet | MappedNet,
    spec: EncoderSpec,
    manifest: Manifest | None,
    device: torch.device,
    taken: str | None,
) -> Encoder:
    """The model on its device, checked against the manifest. Without a manifest one is made."""
    if manifest is not None and model.head != manifest.head:
        raise EncoderMismatch(
            f"encoder {manifest.id}: its embedding is declared as head {model.head}, but its manifest says "
            f"{manifest.head}: set head to {manifest.head}, or declare this as a new encoder"
        )
    digest = hash_weights(model)
    if manifest is not None and digest != manifest.weights_sha256:
        raise EncoderMismatch(
            f"encoder {manifest.id}: the weights in {weights_name(spec)} are not those of its manifest (sha256 "
            f"{digest[:12]}... instead of {manifest.weights_sha256[:12]}...): restore them, or declare this as a new "
            "encoder"
        )
    try:
        model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    except RuntimeError as error:
        raise EncoderProblem(f"{display_name(spec.arch)} cannot be moved to {device}: {one_line(error)}") from error
    fingerprint = fingerprint_of(model, spec.preprocessing, device)
    if manifest is None:
        manifest = manifest_of(spec, model, fingerprint)
    agreement = float(np.dot(fingerprint, np.asarray(manifest.fingerprint)) / np.linalg.norm(manifest.fingerprint))
    if not agreement >= FINGERPRINT_AGREEMENT:
        raise EncoderMismatch(
            f"encoder {manifest.id}: weights and preprocessing are unchanged, but the output for the fingerprint image "
            f"is not (cosine {agreement:.4f}): use the versions of torch, timm, onnxruntime and Pillow that its "
            "manifest was made with"
        )
    return Encoder(model, manifest, device, taken)


def _load_model(
    spec: EncoderSpec, device: torch.device, *, any_dim: bool = False
) -> tuple[EmbeddingNet | MappedNet, str | None]:
    """The model with its weights, on the CPU but for a program, and what of the weights file it is if not all.

    With `any_dim` its vectors may have any length.
    """
    require_program(spec)
    if spec.weights is None and not spec.pretrained and not spec.arch.startswith(MODULE):
        raise EncoderProblem(f"encoder {spec.arch!r} has no weights: set weights to a file, or pretrained to true")
    if spec.weights is None or spec.weights.suffix == PROGRAMS.get(spec.arch):
        refuse_head(spec)
        model = bare_network(create_backbone(spec, device), spec, any_dim=any_dim)
        require_finite(model, weights_name(spec))
        return model, None
    if spec.weights.suffix in PROGRAMS.values():
        raise EncoderProblem(
            f"weights {weights_name(spec)} must be a state dict (.safetensors, .pt, .pth, .ckpt, .bin): remove arch "
            "and module for a program"
        )
    content = read_weights(spec.weights)
    if "map.linear.weight" in content and all(str(name).startswith(("base.", "map.")) for name in content):
        if spec.checkpoint_key is not None:
            raise EncoderProblem(f"weights {weights_name(spec)} are one encoder with its map: remove checkpoint_key")
        return _mapped_model(spec, state_dicts(content)[""], device), None
    if spec.arch in PROGRAMS:
        raise EncoderProblem(
            f"weights {weights_name(spec)} hold no map to follow {display_name(spec.arch)}: name that file itself"
        )
    parts = _parts(spec, device)
    found = find_weights(spec.weights, content, parts.network, spec.checkpoint_key)
    if found.fits:
        return _stateful_model(spec, found.state, parts, device, any_dim=any_dim), str(found) or None
    try:
        return _stateful_model(spec, found.state, parts, device, any_dim=any_dim), str(found) or None
    except EncoderProblem as problem:
        raise EncoderProblem(f"{problem}; {advice(content, found, parts.network)}") from problem


def checkpoint_keys(spec: EncoderSpec) -> list[str]:
    """The values of `checkpoint_key` that pick weights of this architecture from the file.

    Raises EncoderProblem as `load_encoder` does.
    """
    if spec.weights is None or spec.arch in PROGRAMS:
        return []
    return places(read_weights(spec.weights), _parts(spec, torch.device("cpu")).network)


@dataclass(frozen=True)
class _Parts:
    """What an architecture consists of: timm's, or the module that a factory has returned."""

    network: Network
    timm: TimmLayout | None = None
    module: nn.Module | None = None


def _parts(spec: EncoderSpec, device: torch.device) -> _Parts:
    if spec.arch.startswith(MODULE):
        module = create_backbone(spec, device)
        return _Parts(Network(display_name(spec.arch), module.state_dict()), module=module)
    layout = timm_layout(spec.arch, image_size=spec.preprocessing.image_size)
    return _Parts(Network(display_name(spec.arch), layout.features, layout.in_head, layout.renamed), timm=layout)


def _mapped_model(spec: EncoderSpec, state: Mapping[str, torch.Tensor], device: torch.device) -> MappedNet:
    base_state, map_state = (
        {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
        for part in ("base.", "map.")
    )
    try:
        fitted = Map.like(map_state)
    except ValueError as error:
        raise EncoderProblem(f"weights {weights_name(spec)} do not hold a map: {error}") from error
    _require_fit(fitted, map_state, spec)
    fitted.load_state_dict(map_state)
    if fitted.outputs != spec.dim:
        raise EncoderProblem(
            f"weights {weights_name(spec)} give {fitted.outputs}-d vectors: set dim to that, not {spec.dim}"
        )
    below = replace(spec, dim=fitted.inputs)
    if spec.arch in PROGRAMS:
        base = bare_network(create_backbone(below, device), below)
    else:
        base = _stateful_model(below, base_state, _parts(below, device), device)
    model = MappedNet(base, fitted.requires_grad_(False))
    require_finite(model, weights_name(spec))
    return model


def _stateful_model(
    spec: EncoderSpec,
    state: dict[str, torch.Tensor],
    parts: _Parts,
    device: torch.device,
    *,
    any_dim: bool = False,
) -> EmbeddingNet:
    backbone = parts.module
    if backbone is not None and {name for name in backbone.state_dict() if is_needed(name)} <= state.keys():
        # A factory's module may have layers of any name: if all of its own are there, these are its weights.
        refuse_head(spec)
        model = bare_network(backbone, spec, any_dim=True)
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
    elif "projection.weight" in state:
        refuse_head(spec)
        outputs = state["projection.weight"].shape[:1]
        if outputs != (spec.dim,) and not (any_dim and outputs):
            raise EncoderProblem(
                f"weights {weights_name(spec)} give {outputs[0] if outputs else 0}-d vectors: set dim to that, not "
                f"{spec.dim}"
            )
        backbone = backbone or create_backbone(spec, device)
        model = EmbeddingNet(backbone, width=feature_width(backbone, spec), dim=outputs[0])
    else:
        plain = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
        model, state = _plain_model(spec, plain, parts, device, any_dim=any_dim)
    _require_fit(model, state, spec)
    if not any_dim:
        require_features(model.dim, spec)
    try:
        model.load_state_dict(state)
    except Exception as error:  # exotic tensors (sparse, quantised, without storage)
        raise EncoderProblem(f"weights {weights_name(spec)} cannot be used: {one_line(error)}") from error
    require_finite(model, weights_name(spec))
    return model


def _plain_model(
    spec: EncoderSpec, state: dict[str, torch.Tensor], parts: _Parts, device: torch.device, *, any_dim: bool
) -> tuple[EmbeddingNet, dict[str, torch.Tensor]]:
    """A model, and the state it needs under its own names, for a state dict with timm's or the factory's names."""
    head: Head = "none"
    if parts.timm is None:
        refuse_head(spec)
    else:
        head = _head(spec, state, parts.timm)
        if head == "none":
            state = {name: tensor for name, tensor in state.items() if not parts.timm.in_head(name)}
    classes = 0
    if parts.timm is not None and head == "classifier":
        classes = _classes(spec, parts.timm.outputs(state), any_dim=any_dim)
    backbone = parts.module or create_backbone(spec, device, classes=classes)
    model = bare_network(backbone, spec, head=head, any_dim=True)
    return model, {f"backbone.{name}": tensor for name, tensor in state.items()}


def _head(spec: EncoderSpec, state: Mapping[str, torch.Tensor], layout: TimmLayout) -> Literal["classifier", "none"]:
    """What gives the embedding: as declared, or else the classifier where it has `dim` outputs."""
    replaced = [name for name in state if layout.in_head(name) and name not in layout.head]
    if replaced and spec.head != "none":
        raise EncoderProblem(
            f"weights {weights_name(spec)} hold {', '.join(replaced[:3])} in place of the classifier of "
            f"{display_name(spec.arch)}: set head to none for the pooled features below it, or give a module that "
            "builds the whole network"
        )
    return spec.head or ("classifier" if layout.outputs(state) == {spec.dim} else "none")


def _classes(spec: EncoderSpec, outputs: set[int], *, any_dim: bool) -> int:
    """How many outputs the classifier has that is to give the embedding."""
    if len(outputs) != 1:
        found = f"classifiers of {' and '.join(map(str, sorted(outputs)))} outputs" if outputs else "no classifier"
        raise EncoderProblem(f"weights {weights_name(spec)} hold {found}: set head to none for the pooled features")
    (classes,) = outputs
    if classes != spec.dim and not any_dim:
        raise EncoderProblem(
            f"the classifier in weights {weights_name(spec)} has {classes} outputs: set dim to {classes}, or head to "
            "none for the pooled features"
        )
    return classes


def _require_fit(model: nn.Module, state: Mapping[str, torch.Tensor], spec: EncoderSpec) -> None:
    needed: Mapping[str, torch.Tensor] = model.state_dict()
    if isinstance(model, EmbeddingNet) and model.head != "projection":  # names as their own model has them
        needed, state = (
            {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()} for tensors in (needed, state)
        )
    problems = {
        "missing": [name for name in needed if name not in state and is_needed(name)],
        "unknown": [name for name in state if name not in needed],
        "of another shape or type": [
            f"{name} {kind(state[name])} instead of {kind(needed[name])}"
            for name in needed
            if name in state and kind(state[name]) != kind(needed[name])
        ],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:2])})" for what, names in problems.items() if names]
    if found:
        raise EncoderProblem(
            f"weights {weights_name(spec)} do not fit {display_name(spec.arch)}: {one_line('; '.join(found))}"
        )
