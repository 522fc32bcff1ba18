"""Building a network from its declaration, without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from migrator.trainer.encoders.architecture import PROGRAMS, display_name
from migrator.trainer.encoders.encoder import Encoder, fingerprint_of, manifest_of
from migrator.trainer.encoders.networks import EmbeddingNet
from migrator.trainer.encoders.programs import Program
from migrator.trainer.encoders.spec import EncoderSpec, require_dim, require_program, weights_name
from migrator.trainer.encoders.timm_models import timm_backbone
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.factories import MODULE, call_factory
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing
from migrator.trainer.images.transforms import open_transform
from migrator.trainer.maps import POST_HOC
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from migrator.trainer.encoders.manifest import Head


def build_model(spec: EncoderSpec) -> EmbeddingNet:
    """A model to train: the backbone (random, timm's with `pretrained`, or as its factory made it) below a fresh
    projection to `dim`.

    `spec.weights` is not read: `load_encoder` does that. Raises EncoderProblem for an architecture that cannot be
    built, cannot be trained, or cannot take pictures of this size.
    """
    require_dim(spec)
    if spec.arch in PROGRAMS:
        raise EncoderProblem(
            f"{display_name(spec.arch)} {weights_name(spec)} can be run but not trained: give arch or module, or "
            f"train a map to the old space ({', '.join(POST_HOC)})"
        )
    return _fresh_model(spec, torch.device("cpu"))


def untrained_encoder(spec: EncoderSpec, *, device: str = "auto") -> Encoder:
    """An encoder of `spec` with random weights, as fast as a trained one: for measuring speed before training.

    Raises EncoderProblem as `build_model` does, but takes files that cannot be trained too.
    """
    require_dim(spec)
    target = open_device(device)
    model = _fresh_model(replace(spec, pretrained=False), target)
    model = model.to(target, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    fingerprint = fingerprint_of(model, spec.preprocessing, target)
    return Encoder(model, manifest_of(spec, model, fingerprint), target)


def create_backbone(spec: EncoderSpec, device: torch.device, *, classes: int = 0) -> nn.Module:
    """The network below the head; with `classes` a timm model keeps its classifier layer. Raises EncoderProblem."""
    transform = spec.preprocessing.transform
    if transform is not None:
        open_transform(transform, spec.folder)
    size = spec.preprocessing.image_size
    if spec.arch in PROGRAMS:
        assert spec.weights is not None  # require_program
        return Program(spec.weights.with_suffix(PROGRAMS[spec.arch]), image_size=size, device=device)
    if spec.arch.startswith(MODULE):
        place = spec.arch.removeprefix(MODULE)
        return call_factory(place, spec.folder, with_transform=transform in (spec.arch, place))
    pretrained = spec.pretrained and not spec.weights
    return timm_backbone(spec.arch, image_size=size, classes=classes, pretrained=pretrained)


def _fresh_model(spec: EncoderSpec, device: torch.device) -> EmbeddingNet:
    require_program(spec)
    backbone = create_backbone(spec, device)
    return EmbeddingNet(backbone, width=feature_width(backbone, spec), dim=spec.dim)


def feature_width(backbone: nn.Module, spec: EncoderSpec) -> int:
    """Numbers that the backbone gives per picture, found by asking it: timm's attributes differ between families."""
    height, width = spec.preprocessing.size
    training = backbone.training
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, 3, height, width))
    except EncoderProblem:
        raise
    except Exception as error:
        raise EncoderProblem(
            f"{display_name(spec.arch)} cannot take pictures of {height} x {width} pixels: {one_line(error)}"
        ) from error
    finally:
        backbone.train(training)
    if not isinstance(features, torch.Tensor):
        raise EncoderProblem(
            f"{display_name(spec.arch)} gives a {type(features).__name__}, not one tensor with one row per picture"
        )
    if features.ndim != 2 or len(features) != 1 or not features.shape[1]:
        raise EncoderProblem(
            f"{display_name(spec.arch)} gives features of shape {tuple(features.shape)} for a picture, not (1, d): "
            "pool them to one row per picture"
        )
    return features.shape[1]


def bare_network(backbone: nn.Module, spec: EncoderSpec, *, head: Head = "none", any_dim: bool = False) -> EmbeddingNet:
    """The backbone alone: what it gives is the embedding."""
    width = feature_width(backbone, spec)
    if not any_dim:
        require_features(width, spec)
    return EmbeddingNet(backbone, width=width, dim=width, head=head)


def require_features(width: int, spec: EncoderSpec) -> None:
    """Raises EncoderProblem where features of this width are not the vectors that `spec` declares."""
    if width != spec.dim:
        raise EncoderProblem(
            f"{display_name(spec.arch)} gives {width}-d features and its weights have no layer of {spec.dim} outputs: "
            f"set dim to {width}"
        )


def open_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:1`. Raises EncoderProblem where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EncoderProblem(f"device {name!r} is not one that torch knows: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise EncoderProblem(f"device {name!r} is not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EncoderProblem(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices, use auto or cpu"
        )
    return device
