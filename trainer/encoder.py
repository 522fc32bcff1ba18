"""Encoders: a timm backbone with its head, its preprocessing, its weights, and the card that says what it was.

An encoder's id is a hash of its weights, architecture, preprocessing and of the vector it gave for a fixed probe image
when its card was made. Floating-point results differ in their last bits between machines, so on loading the probe's
live vector is compared with the card's by their cosine, and the recorded one stays part of the id.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.errors import EncoderMismatch, EncoderProblem
from trainer.torchvision_cpu import import_timm

if TYPE_CHECKING:
    from PIL import Image

Head = Literal["projection", "classifier", "none"]
"""What turns pooled features into the embedding: our projection and norm, the model's own classifier layer, nothing."""

Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["squash", "crop"]

PROBE_AGREEMENT = 0.9999
"""Least cosine between the probe's recorded and live vectors. Rounding, threads and batch size stay above 0.99999."""

_CARD_FORMAT = 1
_LARGEST_IMAGE = 4096
_LARGEST_DIM = 65_536
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB picture becomes the model's input: resized to a square, scaled to 0..1, normalised per channel.

    `squash` ignores the picture's shape; `crop` keeps the largest centred square, as scaling the shorter side and then
    cropping does. Mean and standard deviation
    default to ImageNet's. Raises EncoderProblem for values outside their range.
    """

    image_size: int  # pixels a side
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= _LARGEST_IMAGE:
            raise EncoderProblem(f"image_size {self.image_size!r} must be a whole number from 1 to {_LARGEST_IMAGE}")
        for name, value, known in (
            ("resize", self.resize, get_args(Resize)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in known:
                raise EncoderProblem(f"{name} {value!r} must be one of {', '.join(known)}")
        for name in ("mean", "std"):
            try:
                values = tuple(float(value) for value in getattr(self, name))
            except (TypeError, ValueError) as error:
                raise EncoderProblem(f"{name} {getattr(self, name)!r} must be three numbers") from error
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise EncoderProblem(f"{name} {values} must be three finite numbers, and std positive")
            object.__setattr__(self, name, values)

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB picture as a model's input, (3, S, S) uint8. Safe in many threads, and does not use torch."""
        from PIL.Image import Resampling

        size = self.image_size
        width, height = image.size
        box = None
        if self.resize == "crop" and width != height:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            box = (left, top, left + side, top + side)
        if box or (width, height) != (size, size):
            resampling = Resampling.BICUBIC if self.interpolation == "bicubic" else Resampling.BILINEAR
            image = image.resize((size, size), resampling, box=box)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder as a user declares it. `weights` is a .safetensors, .pt or .pth file of a state dict."""

    arch: str
    dim: int
    preprocessing: Preprocessing
    weights: Path | None = None
    pretrained: bool = False
    """Take the backbone's weights from timm's hub. Needs the network unless they are cached."""


@dataclass(frozen=True)
class Card:
    """What an encoder was when its card was made. `probe` is its vector for the probe image, to 6 decimals."""

    id: str
    arch: str
    dim: int
    head: Head
    preprocessing: Preprocessing
    weights_sha256: str
    probe: tuple[float, ...]  # (dim,), unit length

    @classmethod
    def make(
        cls, *, arch: str, dim: int, head: Head, preprocessing: Preprocessing, weights_sha256: str, probe: Any
    ) -> Card:
        """A card with the id that follows from its contents."""
        rounded = tuple(round(float(value), 6) + 0.0 for value in probe)  # + 0.0: one zero, not two
        contents = {
            "arch": arch,
            "dim": dim,
            "head": head,
            "preprocessing": asdict(preprocessing),
            "weights_sha256": weights_sha256,
            "probe": rounded,
        }
        digest = hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return cls(f"enc-{digest[:16]}", arch, dim, head, preprocessing, weights_sha256, rounded)

    def to_json(self) -> str:
        """One JSON document with `"format": 1`."""
        return json.dumps({"format": _CARD_FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The card that `to_json` wrote. Raises EncoderProblem for anything else, an edited card included."""
        try:
            document = json.loads(text)
            if document["format"] != _CARD_FORMAT:
                raise EncoderProblem(f"has format {document['format']!r}, but this version reads {_CARD_FORMAT}")
            card = cls.make(
                arch=str(document["arch"]),
                dim=int(document["dim"]),
                head=document["head"],
                preprocessing=Preprocessing(**document["preprocessing"]),
                weights_sha256=str(document["weights_sha256"]),
                probe=document["probe"],
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise EncoderProblem("is not an encoder card") from error
        usable = (
            card.head in get_args(Head)
            and len(card.probe) == card.dim
            and math.isclose(math.hypot(*card.probe), 1, rel_tol=1e-3)
        )
        if not usable or card.id != document.get("id"):
            raise EncoderProblem("was changed after it was written: its id does not follow from its contents")
        return card


class EmbeddingNet(nn.Module):
    """Backbone, then (for the head `projection`) Linear(d -> D, no bias) and BatchNorm1d(D): AdvBCT's model.

    forward: (n, 3, S, S) normalised float -> (n, D) embeddings, not yet of unit length.
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


class Encoder:
    """A model with its preprocessing: pictures in, vectors of unit length out."""

    def __init__(self, model: EmbeddingNet, card: Card, device: torch.device) -> None:
        self.model = model
        self.card = card
        self.device = device

    @property
    def id(self) -> str:
        """Hash of weights, architecture, preprocessing and probe vector; what items are stamped with."""
        return self.card.id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.card.dim

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """`Preprocessing.prepare` of this encoder: an RGB picture -> (3, S, S) uint8. Safe in many threads."""
        return self.card.preprocessing.prepare(image)

    def encode(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, 3, S, S) uint8 from `prepare` -> (n, dim) float32 of unit length.

        A row's vector does not depend on the other rows, beyond the last bits of floating-point sums.
        Raises EncoderProblem for a batch of another shape or type, and where a vector is zero or not finite.
        """
        return _encode(self.model, self.card.preprocessing, self.device, batch)


def build_model(spec: EncoderSpec) -> EmbeddingNet:
    """A model to train: the backbone (random, or timm's with `pretrained`) below a fresh projection to `dim`.

    `spec.weights` is not read: `load_encoder` does that. Raises EncoderProblem for an architecture that timm does not
    know or that cannot take pictures of this size.
    """
    _require_dim(spec)
    backbone = _create_backbone(spec, classes=0)
    return EmbeddingNet(backbone, width=_width(backbone, spec), dim=spec.dim)


def untrained_encoder(spec: EncoderSpec, *, device: str = "auto") -> Encoder:
    """An encoder of `spec` with random weights, as fast as a trained one: for measuring speed before training.

    Raises EncoderProblem as `build_model` does.
    """
    target = _device(device)
    model = build_model(replace(spec, pretrained=False)).to(target, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    probe = _probe_vector(model, spec.preprocessing, target)
    return Encoder(model, _make_card(spec, model.head, _weights_sha256(model), probe), target)


def load_encoder(spec: EncoderSpec, *, expected: Card | None = None, device: str = "auto") -> Encoder:
    """The encoder of `spec`, checked against `expected`, or else against the card beside its weights if there is one.

    Weights are either ours (`backbone.*`, `projection.weight`, `norm.*`) or a plain timm state dict. Of a plain one the
    classifier layer gives the embedding where it has `dim` outputs, else the pooled features do, which must then be
    `dim` wide. `device` is `auto` (CUDA where available), `cpu`, `cuda` or `cuda:1`.

    Raises EncoderMismatch where the encoder is not what the card says, EncoderProblem where it cannot be loaded.
    """
    _require_dim(spec)
    card = expected or (read_card(spec.weights) if spec.weights else None)
    if card is not None:
        _require_same_declaration(spec, card)
    target = _device(device)
    model = _load_model(spec)
    digest = _weights_sha256(model)
    if card is not None and digest != card.weights_sha256:
        raise EncoderMismatch(
            f"encoder {card.id}: the weights in {_named(spec)} are not those of its card (sha256 {digest[:12]}... "
            f"instead of {card.weights_sha256[:12]}...): restore them, or declare this as a new encoder"
        )
    try:
        model = model.to(target, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    except RuntimeError as error:
        raise EncoderProblem(f"encoder {spec.arch!r} cannot be moved to {target}: {_line(error)}") from error
    probe = _probe_vector(model, spec.preprocessing, target)
    if card is None:
        card = _make_card(spec, model.head, digest, probe)
    agreement = float(np.dot(probe, np.asarray(card.probe)) / np.linalg.norm(card.probe))
    if not agreement >= PROBE_AGREEMENT:
        raise EncoderMismatch(
            f"encoder {card.id}: weights and preprocessing are unchanged, but the output for the probe image is not "
            f"(cosine {agreement:.4f}): use the versions of torch, timm and Pillow that its card was made with"
        )
    return Encoder(model, card, target)


def save_encoder(model: EmbeddingNet, spec: EncoderSpec, path: Path) -> Card:
    """Writes the weights to `path` (.safetensors) and the card beside them (.json), each whole or not at all.

    Weights go first: after a crash between the two, loading meets weights without a card or with one that refuses them.
    Raises EncoderProblem where the model gives no usable vector or the files cannot be written.
    """
    from safetensors.torch import save

    if path.suffix != ".safetensors":
        raise EncoderProblem(f"encoder cannot be written to {str(path)!r}: give it the suffix .safetensors")
    frozen = copy.deepcopy(model).float().cpu().eval()
    _require_finite(frozen, "to be saved")
    probe = _probe_vector(frozen, spec.preprocessing, torch.device("cpu"))
    card = _make_card(spec, frozen.head, _weights_sha256(frozen), probe)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in frozen.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, save(state, metadata={"format": "pt", "encoder": card.id}))
        _write_whole(_card_path(path), card.to_json().encode())
    except OSError as error:
        raise EncoderProblem(f"encoder cannot be written to {str(path)!r}: {error.strerror}") from error
    return card


def read_card(path: Path) -> Card | None:
    """The card beside the weights at `path`, or None where there is none. Raises EncoderProblem for a damaged one."""
    place = _card_path(path)
    try:
        return Card.from_json(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except EncoderProblem as problem:
        raise EncoderProblem(
            f"card {str(place)!r} {problem}: restore it, or move it away to make a new one"
        ) from problem
    except (OSError, UnicodeDecodeError) as error:
        raise EncoderProblem(f"card {str(place)!r} cannot be read: {_line(error)}") from error


def _encode(
    model: EmbeddingNet, preprocessing: Preprocessing, device: torch.device, batch: NDArray[np.uint8]
) -> NDArray[np.float32]:
    size = preprocessing.image_size
    if batch.dtype != np.uint8 or batch.shape[1:] != (3, size, size):
        raise EncoderProblem(
            f"batch is {batch.dtype} {batch.shape}, but the encoder takes uint8 (n, 3, {size}, {size})"
        )
    if not len(batch):
        return np.empty((0, model.dim), dtype=np.float32)
    deviation = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * 255
    mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
    try:
        with torch.inference_mode():
            # torch.tensor copies: sharing a read-only array (a memory map) would draw a warning
            pixels = torch.tensor(np.ascontiguousarray(batch), device=device).contiguous(
                memory_format=torch.channels_last
            )
            embeddings = model((pixels.float() - mean) / deviation).float()
            norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
            vectors: NDArray[np.float32] = (embeddings / norms).cpu().numpy()
            usable = (torch.isfinite(norms) & (norms > _SMALLEST_NORM)).squeeze(1).cpu().numpy()
    except torch.OutOfMemoryError as error:
        raise EncoderProblem(
            f"{len(batch)} images at once do not fit into the memory of {device}: lower batch_size"
        ) from error
    if not usable.all():
        rows = tuple(int(row) for row in np.flatnonzero(~usable))
        raise EncoderProblem(
            f"the encoder gives no usable vector (zero or not finite) for {len(rows)} of {len(batch)} images, "
            f"the first in row {rows[0]}",
            rows=rows,
        )
    return vectors


def _probe_vector(model: EmbeddingNet, preprocessing: Preprocessing, device: torch.device) -> NDArray[np.float32]:
    return _encode(model, preprocessing, device, preprocessing.prepare(_probe_image())[np.newaxis])[0]


def _probe_image() -> Image.Image:
    """256 pixels high, 192 wide: a ramp down in red, a ramp across in green, a chequerboard of 32 pixels in blue.

    Made in integers, so the same everywhere; swapped channels, flips and another way of resizing all show.
    """
    from PIL import Image

    rows, columns = np.mgrid[0:256, 0:192]
    board = (rows // 32 + columns // 32) % 2 * 255
    return Image.fromarray(np.stack([rows, columns, board], axis=2).astype(np.uint8))


def _create_backbone(spec: EncoderSpec, *, classes: int) -> nn.Module:
    settings = _known(spec.arch)
    options: dict[str, Any] = {"num_classes": classes}
    if settings is not None and settings.fixed_input_size:
        options["img_size"] = spec.preprocessing.image_size
    try:
        backbone: nn.Module = import_timm().create_model(
            spec.arch, pretrained=spec.pretrained and not spec.weights, **options
        )
    except Exception as error:  # timm's constructors and its hub client raise all kinds
        raise EncoderProblem(f"architecture {spec.arch!r} cannot be built: {_line(error)}") from error
    return backbone


def _known(arch: str) -> Any:
    """What timm's registry says about an architecture; None where that is nothing."""
    timm = import_timm()
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise EncoderProblem(f"timm knows no architecture {arch!r}: {hint}")
    return timm.get_pretrained_cfg(arch)


def _width(backbone: nn.Module, spec: EncoderSpec) -> int:
    """Numbers that the backbone gives per picture, found by asking it: timm's attributes differ between families."""
    size = spec.preprocessing.image_size
    training = backbone.training
    try:
        with torch.no_grad():
            features: torch.Tensor = backbone.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise EncoderProblem(
            f"architecture {spec.arch!r} cannot take pictures of {size} pixels: {_line(error)}"
        ) from error
    finally:
        backbone.train(training)
    if features.ndim != 2:
        raise EncoderProblem(
            f"architecture {spec.arch!r} gives features of shape {tuple(features.shape)}, not one row a picture"
        )
    return features.shape[1]


def _load_model(spec: EncoderSpec) -> EmbeddingNet:
    if spec.weights is None:
        if not spec.pretrained:
            raise EncoderProblem(f"encoder {spec.arch!r} has no weights: set weights to a file, or pretrained to true")
        backbone = _create_backbone(spec, classes=0)
        _require_features(_width(backbone, spec), spec)
        return EmbeddingNet(backbone, width=spec.dim, dim=spec.dim, head="none")
    state = _read_state(spec.weights)
    if "projection.weight" in state:
        backbone = _create_backbone(spec, classes=0)
        model = EmbeddingNet(backbone, width=_width(backbone, spec), dim=spec.dim)
        outputs = state["projection.weight"].shape[:1]
        if outputs != (spec.dim,):
            raise EncoderProblem(
                f"weights {_named(spec)} give {outputs[0] if outputs else 0}-d vectors: set dim to that, not {spec.dim}"
            )
    else:
        model, state = _plain_model(spec, {name.removeprefix("backbone."): tensor for name, tensor in state.items()})
    _require_fit(model, state, spec)
    try:
        model.load_state_dict(state)
    except Exception as error:  # exotic tensors (sparse, quantised, without storage)
        raise EncoderProblem(f"weights {_named(spec)} cannot be used: {_line(error)}") from error
    _require_finite(model, _named(spec))
    return model


def _plain_model(spec: EncoderSpec, state: dict[str, torch.Tensor]) -> tuple[EmbeddingNet, dict[str, torch.Tensor]]:
    """A model, and the state it needs under its own names, for a state dict with timm's names."""
    settings = _known(spec.arch)
    classifier = (settings.classifier if settings else None) or ()
    layers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    outputs = {state[f"{layer}.weight"].shape[:1] for layer in layers if f"{layer}.weight" in state}
    head: Head = "classifier" if outputs == {(spec.dim,)} else "none"
    backbone = _create_backbone(spec, classes=spec.dim if head == "classifier" else 0)
    _require_features(_width(backbone, spec), spec)
    if head == "none":
        unused = tuple(f"{layer}." for layer in layers)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    model = EmbeddingNet(backbone, width=spec.dim, dim=spec.dim, head=head)
    return model, {f"backbone.{name}": tensor for name, tensor in state.items()}


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file by name. Nothing in it is run: pickled code is refused."""
    import pickle

    from safetensors.torch import load_file

    named = f"weights {str(path)!r}"
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise EncoderProblem(f"{named} must be a .safetensors, .pt or .pth file")
    if not path.is_file():
        raise EncoderProblem(f"{named} is not there: check weights in the configuration")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickle protocols and archives; what counts is raised
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderProblem(
            f"{named} is damaged or holds Python objects, which are not loaded: save its state_dict()"
        ) from error
    except Exception as error:  # readers of damaged files raise all kinds
        raise EncoderProblem(f"{named} cannot be loaded, it may be damaged: {_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    ):
        raise EncoderProblem(f"{named} is not a state dict: save its state_dict()")
    if all(str(name).startswith("module.") for name in state):  # saved from a DistributedDataParallel model
        return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    return {str(name): tensor for name, tensor in state.items()}


def _require_fit(model: nn.Module, state: Mapping[str, torch.Tensor], spec: EncoderSpec) -> None:
    needed = model.state_dict()
    problems = {
        # old state dicts lack this counter, which only training uses
        "missing": [name for name in needed if name not in state and not name.endswith(".num_batches_tracked")],
        "unknown": [name for name in state if name not in needed],
        "of another shape or type": [
            f"{name} {_kind(state[name])} instead of {_kind(needed[name])}"
            for name in needed
            if name in state and _kind(state[name]) != _kind(needed[name])
        ],
    }
    found = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
    if found:
        raise EncoderProblem(f"weights {_named(spec)} do not fit architecture {spec.arch!r}: {_line('; '.join(found))}")


def _kind(tensor: torch.Tensor) -> str:
    """Shape, and whether the numbers are floating-point. Their precision does not matter: the model's is float32."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' ' + str(tensor.dtype)}"


def _require_finite(model: nn.Module, named: str) -> None:
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise EncoderProblem(f"weights {named} hold numbers that are not finite, in {name}")


def _require_features(width: int, spec: EncoderSpec) -> None:
    if width != spec.dim:
        raise EncoderProblem(
            f"architecture {spec.arch!r} gives {width}-d features and its weights have no layer of {spec.dim} outputs: "
            f"set dim to {width}"
        )


def _require_dim(spec: EncoderSpec) -> None:
    if not 1 <= spec.dim <= _LARGEST_DIM:
        raise EncoderProblem(f"dim {spec.dim} must be from 1 to {_LARGEST_DIM}")


def _require_same_declaration(spec: EncoderSpec, card: Card) -> None:
    for name, now, then in (("architecture", spec.arch, card.arch), ("dim", spec.dim, card.dim)):
        if now != then:
            raise EncoderMismatch(f"encoder {card.id}: its {name} is declared as {now!r}, but its card says {then!r}")
    declared, recorded = asdict(spec.preprocessing), asdict(card.preprocessing)
    changed = [
        f"{name} {declared[name]!r} instead of {recorded[name]!r}"
        for name in recorded
        if declared[name] != recorded[name]
    ]
    if changed:
        raise EncoderMismatch(f"encoder {card.id}: its preprocessing is not that of its card: {', '.join(changed)}")


def _weights_sha256(model: nn.Module) -> str:
    """Hash of names, types, shapes and values, so that it is the same for every file format that holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _make_card(spec: EncoderSpec, head: Head, weights_sha256: str, probe: NDArray[np.float32]) -> Card:
    return Card.make(
        arch=spec.arch,
        dim=spec.dim,
        head=head,
        preprocessing=spec.preprocessing,
        weights_sha256=weights_sha256,
        probe=probe,
    )


def _device(name: str) -> torch.device:
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


def _card_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def _write_whole(path: Path, data: bytes) -> None:
    """The file appears complete and durable under its name, or not at all."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _named(spec: EncoderSpec) -> str:
    return repr(str(spec.weights)) if spec.weights else f"timm's hub for {spec.arch!r}"


def _line(foreign: object) -> str:
    """A foreign exception or text as one line of bounded length."""
    return " ".join(str(foreign).split())[:300] or type(foreign).__name__
