"""Finding a network's weights in a file as training scripts leave it.

A file may be a state dict, or hold several beside an optimiser's state and settings; and the names in a state dict
may begin with those of the modules that were around the network. `find_weights` finds the tensors that are a given
network's by their names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from migrator.trainer.errors import EncoderProblem

if TYPE_CHECKING:
    from pathlib import Path

State = dict[str, Tensor]

WRAPPERS = (
    "module",  # DistributedDataParallel, DataParallel, AveragedModel, DeepSpeed
    "model",  # Lightning modules, as their users usually write them
    "net",
    "network",
    "encoder",
    "backbone",
    "teacher",
    "student",
    "online_model",
    "ema_model",
    "timm_model",  # transformers
    "trunk",  # open_clip
    "visual",
)
"""Modules that are usually around a network. Any other is found too, where the whole network lies below it."""

_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Modules that torch and Fabric insert anywhere among a network's own: compilation, sharding, checkpointing."""

_NO_WEIGHTS = ("total_ops", "total_params")
"""Counters that the profiler thop leaves in every layer."""

_EXPECTED_BESIDE = re.compile(
    r"n_averaged|initted|step|queue(_ptr)?|((train|val|valid|test)_)?(criterion|loss(es|_fn|_func)?|metrics?|acc(uracy)?)"
    r"(\..*)?|(\w+\.)*head\.(mlp|last_layer)\..*"  # the second line: DINO's projection head
)
"""Tensors that lie beside a network without being a part of it: counters, losses, metrics, queues."""

_MAX_DEPTH = 4
"""Mappings within mappings that are searched for state dicts."""


@dataclass(frozen=True)
class Network:
    """What is sought in a file."""

    named: str
    """As messages call it."""
    tensors: Mapping[str, Tensor]
    """All that it needs, by name. Only shapes and types are read: they may be on torch's meta device."""
    may_have: Callable[[str], bool] = lambda _: False
    """Whether a name that it does not need belongs to it nevertheless, as those of a head do."""
    renamed: Callable[[State], State | None] = lambda _: None
    """A state dict of the same network with older or foreign names under its own, None where it is not one."""

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is this network's: all that it needs, and nothing unknown."""
        return all(
            name in state and kind(state[name]) == kind(tensor)
            for name, tensor in self.tensors.items()
            if is_needed(name)
        ) and all(name in self.tensors or self.may_have(name) for name in state)


@dataclass(frozen=True)
class Found:
    """A network's weights."""

    place: str
    """Where they are in the file, as the key `checkpoint_key` names it: keys, then leading parts of names, dotted."""
    state: State
    """With the network's own names."""
    beside: tuple[str, ...] = ()
    """Names of the same state dict that lie outside."""
    renamed: bool = False
    fits: bool = True

    def __str__(self) -> str:
        """Where the weights are, what is not used, in a few words; empty for a file that is just the state dict."""
        facts = [self.place] if self.place else []
        if self.beside:
            facts.append(f"without {_some(self.beside)} beside it")
        if self.renamed:
            facts.append("with names changed as timm does for this architecture")
        return ", ".join(facts)


def kind(tensor: Tensor) -> str:
    """Shape, and whether the numbers are floating-point. Their precision does not matter: the model's is float32."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' ' + str(tensor.dtype)}"


def is_needed(name: str) -> bool:
    """Whether a tensor must be there: old state dicts lack batch norms' counter, which only training uses."""
    return not name.endswith("num_batches_tracked")


# --- finding --------------------------------------------------------------------------------------------------------


def find_weights(path: Path, content: Mapping[Any, Any], network: Network, key: str | None) -> Found:
    """The one place in a file's content where `network` is, or with `key` the one there.

    Where it is nowhere, the state dict that comes closest: the caller reports what does not fit. Raises
    EncoderProblem where it is in several places with different numbers, or among other weights.
    """
    named = f"weights {str(path)!r}"
    parts = state_dicts(content)
    if not parts:
        raise EncoderProblem(f"{named} is not a state dict, it holds {contents(content)}: save its state_dict()")
    found = _places(parts if key is None else _under(parts, key), network)
    if key is not None:
        found = [one for one in found if one.place == key] or found
    if key is not None and not found and (elsewhere := _places(parts, network)):
        away = _either(elsewhere)
        raise EncoderProblem(
            f"checkpoint_key {key!r} names no weights of {network.named} in {named}: "
            + (f"set it to {away}" if away else "remove it, the file is their state dict")
        )
    if len(found) > 1:
        raise EncoderProblem(
            f"{named} holds different weights of {network.named} in {len(found)} places: set checkpoint_key to "
            f"{_either(found)}"
        )
    if not found:
        if key is not None and not _under(parts, key):
            raise EncoderProblem(f"checkpoint_key {key!r} is not in {named}, which holds {contents(content)}")
        return _closest(_under(parts, key) if key is not None else parts, network)
    unknown = [name for name in found[0].beside if not _EXPECTED_BESIDE.fullmatch(name)]
    if unknown and key is None:
        raise EncoderProblem(
            f"{named} holds weights of {network.named} in {found[0].place}, and {_some(unknown)} beside them: "
            f"set checkpoint_key to {found[0].place} for the former alone, or give a module that builds the whole"
        )
    return found[0]


def places(content: Mapping[Any, Any], network: Network) -> list[str]:
    """Every place in a file's content where `network` is, with different numbers, as `checkpoint_key` names it."""
    return [found.place for found in _places(state_dicts(content), network)]


def _places(parts: Mapping[str, State], network: Network) -> list[Found]:
    return _distinct(_fits(parts, network)) or _distinct(_renamed(parts, network))


def _under(parts: Mapping[str, State], key: str) -> dict[str, State]:
    """What lies below a `checkpoint_key`: state dicts of the file, or a part of one by the beginning of its names."""
    found = {}
    for place, tensors in parts.items():
        if place == key or place.startswith(f"{key}."):
            found[place] = tensors
        elif below := {
            full.removeprefix(f"{key}."): tensor
            for name, tensor in tensors.items()
            if (full := _dotted(place, name)).startswith(f"{key}.")
        }:
            found[key] = below
    return found


def _fits(parts: Mapping[str, State], network: Network) -> Iterator[Found]:
    for place, tensors in parts.items():
        own = _unwrapped(tensors)
        if not any(network.fits(below) for below in (own, tensors)) and is_own(own):
            yield Found(place, own)
            continue
        for outer in _outer(network):
            found = list(_below(place, tensors, network, outer))
            yield from found
            if found:
                break


def _below(place: str, tensors: State, network: Network, outer: str) -> Iterator[Found]:
    """Where the network is in one state dict, whose names lack those of the modules `outer` around the network."""
    anchor = max(filter(is_needed, network.tensors), key=len, default="").removeprefix(outer)
    prefixes = {name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")}
    for prefix in sorted(prefixes):
        below = {outer + name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        if network.fits(below):
            beside = tuple(name for name in tensors if not name.startswith(prefix))
            yield Found(_dotted(place, prefix.rstrip(".")), below, beside)


def _outer(network: Network) -> list[str]:
    """The beginnings that all of a network's names share, such as those of a factory that wraps a model of timm."""
    outer = [""]
    first = next(iter(network.tensors), "")
    for part in first.split(".")[:-1]:
        longer = f"{outer[-1]}{part}."
        if not all(name.startswith(longer) for name in network.tensors):
            break
        outer.append(longer)
    return outer


def _renamed(parts: Mapping[str, State], network: Network) -> Iterator[Found]:
    for place, tensors in parts.items():
        for prefix, below in _below_wrappers(tensors):
            state = network.renamed(below)
            if state is not None and network.fits(state):
                yield Found(_dotted(place, prefix), state, renamed=True)
                break


def _below_wrappers(tensors: State, prefix: str = "") -> Iterator[tuple[str, State]]:
    yield prefix, tensors
    for wrapper in WRAPPERS:
        below = {name.partition(".")[2]: tensors[name] for name in tensors if name.startswith(f"{wrapper}.")}
        if below:
            yield from _below_wrappers(below, _dotted(prefix, wrapper))


def _closest(parts: Mapping[str, State], network: Network) -> Found:
    """The state dict that shares most names with the network."""
    candidates = [Found(place, _unwrapped(tensors, *WRAPPERS), fits=False) for place, tensors in parts.items()]
    return max(candidates, key=lambda one: len(one.state.keys() & network.tensors.keys()))


def is_own(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of migrator's own encoders: a backbone below a projection."""
    return "projection.weight" in state and any(name.startswith("backbone.") for name in state)


def _unwrapped(state: State, *wrappers: str) -> State:
    """A state dict without the wrappers that all its names share."""
    for wrapper in wrappers or ("module",):
        if all(name.startswith(f"{wrapper}.") for name in state):
            return _unwrapped({name.partition(".")[2]: tensor for name, tensor in state.items()}, *wrappers)
    return state


def _distinct(found: Iterator[Found]) -> list[Found]:
    """Those that differ in their numbers."""
    distinct: list[Found] = []
    for one in found:
        if not any(_same(one.state, other.state) for other in distinct):
            distinct.append(one)
    return distinct


def _same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        kind(a[name]) == kind(b[name])
        and a[name].layout == b[name].layout == torch.strided
        and torch.equal(a[name], b[name])
        for name in a
    )


def state_dicts(content: Mapping[Any, Any], place: str = "", depth: int = 0) -> dict[str, State]:
    """Each mapping of a file that has tensors in it, by its dotted place, without other values and wrappers' names."""
    tensors = {
        _clean(name): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and name.rpartition(".")[2] not in _NO_WEIGHTS
    }
    found = {place: tensors} if tensors else {}
    if depth < _MAX_DEPTH:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                found |= state_dicts(value, _dotted(place, name), depth + 1)
    return found


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def contents(content: Mapping[Any, Any]) -> str:
    """What is in a file, in a few words."""
    tensors = [str(name) for name, value in content.items() if isinstance(value, Tensor)]
    facts = [_some(tensors)] if tensors else []
    for name, value in content.items():
        if isinstance(value, Mapping) and (
            inner := [str(key) for key, one in value.items() if isinstance(one, Tensor)]
        ):
            facts.append(f"{name} with {_some(inner)}")
        elif not isinstance(value, Tensor):
            facts.append(str(name))
    sanitized = [" ".join(text.split())[:120] for text in facts[:8]]
    return ", ".join(sanitized) + (f" and {len(facts) - 8} more" if len(facts) > 8 else "") if sanitized else "nothing"


_ELSEWHERE = (
    (r"vision_model\.|.*(encoder\.layers?\.\d+\.(self_attn|attention|self_attention)\.|embeddings\.)", "transformers"),
    (r"(.*\.)?(encoder\.layers\.encoder_layer_\d+|features\.\d+\.\d+)\.", "torchvision"),
    (r"(.*\.)?(transformer\.resblocks\.\d+|visual)\.", "CLIP"),
    (r"backbone\.(layers|stages|blocks)\.\d+\.|bbox_head|decode_head", "OpenMMLab"),
)
"""Names by which a state dict of another library is recognised."""


def advice(content: Mapping[Any, Any], found: Found, network: Network) -> str:
    """What to do about a file in which no state dict fits: whose names these are, what else is there."""
    parts = state_dicts(content)
    if all(name in found.state for name in network.tensors if is_needed(name)) and all(
        name in network.tensors or network.may_have(name) for name in found.state
    ):
        return "all names fit, so these are weights for another image_size, or of another variant of the architecture"
    for pattern, library in _ELSEWHERE:
        if any(re.match(pattern, name) for tensors in parts.values() for name in tensors):
            return f"its names look like those of {library}: give a module whose factory builds that model and loads it"
    if len(parts) > 1:
        return f"the file holds {contents(content)}: set checkpoint_key to the part that is the network"
    return "name the architecture that these are weights of, or give a module whose factory builds the network"


def _some(names: list[str] | tuple[str, ...]) -> str:
    listed = ", ".join(" ".join(name.split())[:60] for name in names[:2])
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed}{', ...' if len(names) > 2 else ''})"


def _either(found: list[Found]) -> str:
    return " or ".join(one.place for one in found[:6])
