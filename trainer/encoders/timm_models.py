"""Architectures of timm: their networks, their tensors, and the preprocessing of their pretrained weights."""

from __future__ import annotations

import difflib
import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from migrator.trainer.encoders.quiet import quiet_loggers
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing, Resize
from migrator.trainer.text import one_line
from migrator.trainer.torchvision_cpu import import_timm

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


def timm_settings(arch: str) -> Any:
    """timm's configuration of an architecture's pretrained weights; None where it has none. Raises EncoderProblem."""
    timm = import_timm()
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise EncoderProblem(f"timm knows no architecture {arch!r}: {hint}")
    return timm.get_pretrained_cfg(arch)


def timm_backbone(arch: str, *, image_size: int | tuple[int, int], classes: int, pretrained: bool) -> nn.Module:
    """A timm model with random weights, or those of timm's hub. Raises EncoderProblem."""
    settings = timm_settings(arch)
    options: dict[str, Any] = {"num_classes": classes}
    if settings is not None and settings.fixed_input_size:
        options["img_size"] = image_size
    try:
        backbone: nn.Module = import_timm().create_model(arch, pretrained=pretrained, **options)
    except Exception as error:  # timm's constructors and its hub client raise all kinds
        raise EncoderProblem(f"architecture {arch!r} cannot be built: {one_line(error)}") from error
    return backbone


@dataclass(frozen=True)
class TimmLayout:
    """An architecture's tensors, with their shapes but without memory for their numbers (torch's meta device)."""

    features: Mapping[str, Tensor]
    """Those that are left with `num_classes=0`."""
    head: frozenset[str]
    """Those that are not."""
    layers: tuple[str, ...]
    """The highest modules, or tensors, of the head."""
    classifiers: Mapping[str, int]
    """Tensors of the head with one entry for each class -> the axis of the classes."""
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
    """Changes the names in a checkpoint of an older timm, or of the model's authors; None where it is neither."""

    def in_head(self, name: str) -> bool:
        """Whether a tensor belongs to the head, as this architecture has it or as someone replaced it."""
        return any(name == layer or name.startswith(f"{layer}.") for layer in self.layers)

    def outputs(self, state: Mapping[str, Tensor]) -> set[int]:
        """The numbers of classes of a state dict's head: one, unless its parts disagree."""
        found = {name: axis for name, axis in self.classifiers.items() if name in state}
        return {state[name].shape[axis] for name, axis in found.items() if state[name].ndim > axis}


@functools.cache
def timm_layout(arch: str, *, image_size: int | tuple[int, int]) -> TimmLayout:
    """What an architecture consists of, found by building it with and without classes. Raises EncoderProblem.

    Building it twice takes as long as all else that loading an encoder does, so each is built once in a process.
    """
    classes = 65_537  # more than an encoder may have, so that no other side of a tensor has this length
    with torch.device("meta"):
        full, bare = (
            timm_backbone(arch, image_size=image_size, classes=count, pretrained=False) for count in (classes, 0)
        )
    tensors, features = full.state_dict(), bare.state_dict()
    head = [name for name in tensors if name not in features]
    return TimmLayout(
        features=features,
        head=frozenset(head),
        layers=tuple(dict.fromkeys(_highest(name, features) for name in head)),
        classifiers={
            name: tuple(tensors[name].shape).index(classes) for name in head if classes in tensors[name].shape
        },
        renamed=lambda state: _renamed_by_timm(arch, full, state),
    )


def _renamed_by_timm(arch: str, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What timm's own filter for checkpoints of this architecture makes of a state dict.

    It may also resample position embeddings to another image size, which is not wanted: then None.
    """
    entry = import_timm().models.model_entrypoint(arch)
    convert = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        with quiet_loggers("timm"):
            found: dict[str, Tensor] = convert(dict(state), model)
    except Exception:  # what it was not made for ends in it anyhow
        return None
    sizes = {tensor.numel() for tensor in state.values()}
    made = {name for name, tensor in found.items() if not isinstance(tensor, Tensor) or tensor.numel() not in sizes}
    return None if made & set(model.state_dict()) - {"head.bias"} else found


def _highest(name: str, others: Collection[str]) -> str:
    """The shortest leading part of a dotted name that no other name shares."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        layer = ".".join(parts[:end])
        if not any(other == layer or other.startswith(f"{layer}.") for other in others):
            return layer
    return name


def timm_preprocessing(arch: str, **given: Any) -> Preprocessing:
    """timm's data config of an architecture's pretrained weights; `given` fields of Preprocessing take precedence.

    Raises EncoderProblem where timm knows no such architecture or has it prepared in a way that is not supported.
    """
    settings = timm_settings(arch)
    if settings is None or not settings.input_size:
        raise EncoderProblem(
            f"timm has no data config for architecture {arch!r}: give image_size, mean, std and resize"
        )
    config = import_timm().data.resolve_data_config(pretrained_cfg=settings.to_dict())
    modes: dict[str, Resize] = {"center": "crop"}
    values: dict[str, Any] = {
        "image_size": config["input_size"][-2:],
        "resize": modes.get(config["crop_mode"], config["crop_mode"]),
        "interpolation": config["interpolation"],
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        **given,
    }
    try:
        return Preprocessing(**values)
    except EncoderProblem as problem:
        raise EncoderProblem(f"timm's data config for architecture {arch!r}: {problem}: give this key") from problem
