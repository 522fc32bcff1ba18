"""Encoders: a network with its head, its preprocessing, its weights, and the manifest that describes them.

An encoder's id is a hash of its weights, architecture, preprocessing and fingerprint: the vector it gave for a fixed
image when its manifest was made. Floating-point results differ in their last bits between machines, so on loading the
vector is computed again and compared with the manifest's by their cosine, and the recorded one stays part of the id.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from migrator.trainer.encoders.backbones import (
    MODULE,
    PROGRAMS,
    Program,
    TimmLayout,
    call_factory,
    display_name,
    one_line,
    timm_backbone,
    timm_layout,
)
from migrator.trainer.encoders.checkpoints import Network, advice, find_weights, is_needed, kind, places, state_dicts
from migrator.trainer.encoders.weights_file import read_weights
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.files import write_whole
from migrator.trainer.images.preprocessing import Preprocessing as Preprocessing
from migrator.trainer.images.preprocessing import fingerprint_image
from migrator.trainer.images.transforms import open_transform
from migrator.trainer.maps import POST_HOC, Map

if TYPE_CHECKING:
    from PIL import Image

Head = Literal["projection", "classifier", "none"]
"""What turns pooled features into the embedding: our projection and norm, the model's own classifier layer, nothing."""

FINGERPRINT_AGREEMENT = 0.9999
"""Minimum cosine between the recorded fingerprint and today's. Rounding, threads and batch size stay above 0.99999."""

_MANIFEST_FORMAT = 2
_FINGERPRINT_KEYS = {1: "probe", 2: "fingerprint"}
"""What the fingerprint is called in a manifest of each format."""
_MAX_DIM = 65_536
_MIN_NORM = 1e-12


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


@dataclass(frozen=True)
class Manifest:
    """What an encoder was when its manifest was made; `encoder.json` beside its weights."""

    id: str
    arch: str
    dim: int
    head: Head
    preprocessing: Preprocessing
    weights_sha256: str
    """Of the state dict, of the bytes of a .pt2 or .onnx file, or of both where a map follows such a file."""
    fingerprint: tuple[float, ...]  # (dim,), unit length
    """Its vector for the fingerprint image, to 6 decimals."""
    map: str | None = None
    """Kind of the map that follows the network, from its vectors to another encoder's."""

    @classmethod
    def make(
        cls,
        *,
        arch: str,
        dim: int,
        head: Head,
        preprocessing: Preprocessing,
        weights_sha256: str,
        fingerprint: Any,
        map: str | None = None,
    ) -> Manifest:
        """A manifest with the id that follows from its contents."""
        rounded = tuple(round(float(value), 6) + 0.0 for value in fingerprint)  # + 0.0: one zero, not two
        contents = {
            "arch": arch,
            "dim": dim,
            "head": head,
            "preprocessing": preprocessing.declared(),
            "weights_sha256": weights_sha256,
            "probe": rounded,  # as it was called in the first manifests: an id never changes
            "map": map,
        }
        digest = hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return cls(f"enc-{digest[:16]}", arch, dim, head, preprocessing, weights_sha256, rounded, map)

    def to_json(self) -> str:
        """One JSON document with `"format": 2`."""
        document = {"format": _MANIFEST_FORMAT, **asdict(self), "preprocessing": self.preprocessing.declared()}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote. Raises EncoderProblem for anything else, an edited manifest included."""
        try:
            document = json.loads(text)
            if document["format"] not in _FINGERPRINT_KEYS:
                raise EncoderProblem(
                    f"has format {document['format']!r}, but this version reads 1 to {_MANIFEST_FORMAT}"
                )
            manifest = cls.make(
                arch=str(document["arch"]),
                dim=int(document["dim"]),
                head=document["head"],
                preprocessing=Preprocessing(**document["preprocessing"]),
                weights_sha256=str(document["weights_sha256"]),
                fingerprint=document[_FINGERPRINT_KEYS[document["format"]]],
                map=document.get("map"),
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise EncoderProblem("is not an encoder manifest") from error
        usable = (
            manifest.head in get_args(Head)
            and manifest.map in (None, *POST_HOC)
            and len(manifest.fingerprint) == manifest.dim
            and math.isclose(math.hypot(*manifest.fingerprint), 1, rel_tol=1e-3)
        )
        if not usable or manifest.id != document.get("id"):
            raise EncoderProblem("was changed after it was written: its id does not follow from its contents")
        return manifest


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


class Encoder:
    """A model with its preprocessing: pictures in, vectors of unit length out."""

    def __init__(
        self, model: EmbeddingNet | MappedNet, manifest: Manifest, device: torch.device, taken: str | None = None
    ) -> None:
        self.model = model
        self.manifest = manifest
        self.device = device
        self.taken = taken
        """Which part of its weights file it is, in a few words; None where it is all of it."""

    @property
    def id(self) -> str:
        """Hash of weights, architecture, preprocessing and fingerprint; what items are stamped with."""
        return self.manifest.id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.manifest.dim

    def with_preprocessing(self, preprocessing: Preprocessing) -> Encoder:
        """The same model behind another preprocessing: another encoder, with a manifest of its own."""
        fingerprint = _fingerprint(self.model, preprocessing, self.device)
        manifest = Manifest.make(
            arch=self.manifest.arch,
            dim=self.manifest.dim,
            head=self.manifest.head,
            preprocessing=preprocessing,
            weights_sha256=self.manifest.weights_sha256,
            fingerprint=fingerprint,
            map=self.manifest.map,
        )
        return Encoder(self.model, manifest, self.device)

    def prepare(self, image: Image.Image) -> NDArray[Any]:
        """`Preprocessing.prepare` of this encoder: a decoded picture -> (3, H, W). Safe in many threads."""
        return self.manifest.preprocessing.prepare(image)

    def encode(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """(n, 3, H, W) from `prepare` -> (n, dim) float32 of unit length.

        A row's vector does not depend on the other rows, beyond the last bits of floating-point sums.
        Raises EncoderProblem for a batch of another shape or type, and where a vector is zero or not finite.
        """
        return _encode(self.model, self.manifest.preprocessing, self.device, batch)


def build_model(spec: EncoderSpec) -> EmbeddingNet:
    """A model to train: the backbone (random, timm's with `pretrained`, or as its factory made it) below a fresh
    projection to `dim`.

    `spec.weights` is not read: `load_encoder` does that. Raises EncoderProblem for an architecture that cannot be
    built, cannot be trained, or cannot take pictures of this size.
    """
    _require_dim(spec)
    if spec.arch in PROGRAMS:
        raise EncoderProblem(
            f"{display_name(spec.arch)} {_named(spec)} can be run but not trained: give arch or module, or train a map "
            f"to the old space ({', '.join(POST_HOC)})"
        )
    return _fresh_model(spec, torch.device("cpu"))


def untrained_encoder(spec: EncoderSpec, *, device: str = "auto") -> Encoder:
    """An encoder of `spec` with random weights, as fast as a trained one: for measuring speed before training.

    Raises EncoderProblem as `build_model` does, but takes files that cannot be trained too.
    """
    _require_dim(spec)
    target = _device(device)
    model = _fresh_model(replace(spec, pretrained=False), target)
    model = model.to(target, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    fingerprint = _fingerprint(model, spec.preprocessing, target)
    return Encoder(model, _make_manifest(spec, model, fingerprint), target)


def load_encoder(spec: EncoderSpec, *, expected: Manifest | None = None, device: str = "auto") -> Encoder:
    """The encoder of `spec`, checked against `expected`, or else against the manifest beside its weights, if any.

    Weights are either migrator's (`backbone.*`, `projection.weight`, `norm.*`; with a map `base.*` and `map.*`), or a
    plain state dict of the timm model or of the factory's module, or a program. Of a plain timm one the classifier
    layer gives the embedding where it has `dim` outputs, else the pooled features do, which must then be `dim` wide.
    `device` is `auto` (CUDA where available), `cpu`, `cuda` or `cuda:1`.

    Raises EncoderMismatch where the encoder is not what the manifest says, EncoderProblem where it cannot be loaded.
    """
    _require_dim(spec)
    manifest = expected or (read_manifest(spec.weights) if spec.weights else None)
    if manifest is not None:
        require_same_declaration(spec, manifest)
    target = _device(device)
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
    target = _device(device)
    model, taken = _load_model(spec, target, any_dim=True)
    if isinstance(model, MappedNet):
        raise EncoderProblem(f"weights {_named(spec)} hold a map already: give those of the encoder below it")
    return _checked(model, replace(spec, dim=model.dim), manifest, target, taken)


def _checked(
    model: EmbeddingNet | MappedNet,
    spec: EncoderSpec,
    manifest: Manifest | None,
    device: torch.device,
    taken: str | None,
) -> Encoder:
    """The model on its device, once it has shown that it is what the manifest says. Without a manifest one is made."""
    if manifest is not None and model.head != manifest.head:
        raise EncoderMismatch(
            f"encoder {manifest.id}: its embedding is declared as head {model.head}, but its manifest says "
            f"{manifest.head}: set head to {manifest.head}, or declare this as a new encoder"
        )
    digest = _weights_sha256(model)
    if manifest is not None and digest != manifest.weights_sha256:
        raise EncoderMismatch(
            f"encoder {manifest.id}: the weights in {_named(spec)} are not those of its manifest (sha256 "
            f"{digest[:12]}... instead of {manifest.weights_sha256[:12]}...): restore them, or declare this as a new "
            "encoder"
        )
    try:
        model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    except RuntimeError as error:
        raise EncoderProblem(f"{display_name(spec.arch)} cannot be moved to {device}: {one_line(error)}") from error
    fingerprint = _fingerprint(model, spec.preprocessing, device)
    if manifest is None:
        manifest = _make_manifest(spec, model, fingerprint)
    agreement = float(np.dot(fingerprint, np.asarray(manifest.fingerprint)) / np.linalg.norm(manifest.fingerprint))
    if not agreement >= FINGERPRINT_AGREEMENT:
        raise EncoderMismatch(
            f"encoder {manifest.id}: weights and preprocessing are unchanged, but the output for the fingerprint image "
            f"is not (cosine {agreement:.4f}): use the versions of torch, timm, onnxruntime and Pillow that its "
            "manifest was made with"
        )
    return Encoder(model, manifest, device, taken)


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
    _require_finite(frozen, "to be saved")
    fingerprint = _fingerprint(frozen, spec.preprocessing, torch.device("cpu"))
    manifest = _make_manifest(spec, frozen, fingerprint)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in frozen.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (program := _program(frozen)) is not None:
            _copy_program(program, path.with_suffix(program.path.suffix))
        write_whole(path, save(state, metadata={"format": "pt", "encoder": manifest.id}))
        write_whole(manifest_path(path), manifest.to_json().encode())
    except OSError as error:
        raise EncoderProblem(f"encoder cannot be written to {str(path)!r}: {error.strerror}") from error
    return manifest


def read_manifest(path: Path) -> Manifest | None:
    """The manifest beside the weights at `path`; None where there is none. Raises EncoderProblem for a damaged one."""
    place = manifest_path(path)
    if place == path:  # no weights file at all, as reading it will tell
        return None
    try:
        return Manifest.from_json(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except EncoderProblem as problem:
        raise EncoderProblem(
            f"manifest {str(place)!r} {problem}: restore it, or move it away to make a new one"
        ) from problem
    except (OSError, UnicodeDecodeError) as error:
        raise EncoderProblem(f"manifest {str(place)!r} cannot be read: {one_line(error)}") from error


def _encode(
    model: EmbeddingNet | MappedNet, preprocessing: Preprocessing, device: torch.device, batch: NDArray[Any]
) -> NDArray[np.float32]:
    height, width = preprocessing.size
    if batch.dtype != preprocessing.dtype or batch.shape[1:] != (3, height, width):
        raise EncoderProblem(
            f"batch is {batch.dtype} {batch.shape}, but the encoder takes {preprocessing.dtype.__name__} "
            f"(n, 3, {height}, {width})"
        )
    if not len(batch):
        return np.empty((0, model.dim), dtype=np.float32)
    deviation = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * preprocessing.levels
    mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * preprocessing.levels
    try:
        with torch.inference_mode():
            # torch.tensor copies: sharing a read-only array (a memory map) would draw a warning
            pixels = torch.tensor(np.ascontiguousarray(batch), device=device).contiguous(
                memory_format=torch.channels_last
            )
            embeddings = model((pixels.float() - mean) / deviation).float()
            if embeddings.shape != (len(batch), model.dim):
                raise EncoderProblem(
                    f"the encoder gives {tuple(embeddings.shape)} for {len(batch)} images, not {model.dim} numbers each"
                )
            norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
            vectors: NDArray[np.float32] = (embeddings / norms).cpu().numpy()
            usable = (torch.isfinite(norms) & (norms > _MIN_NORM)).squeeze(1).cpu().numpy()
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


def _fingerprint(
    model: EmbeddingNet | MappedNet, preprocessing: Preprocessing, device: torch.device
) -> NDArray[np.float32]:
    return _encode(model, preprocessing, device, preprocessing.prepare(fingerprint_image())[np.newaxis])[0]


def _create_backbone(spec: EncoderSpec, device: torch.device, *, classes: int = 0) -> nn.Module:
    transform = spec.preprocessing.transform
    if transform is not None:
        open_transform(transform, spec.folder)
    size = spec.preprocessing.image_size
    if spec.arch in PROGRAMS:
        assert spec.weights is not None  # _require_program
        return Program(spec.weights.with_suffix(PROGRAMS[spec.arch]), image_size=size, device=device)
    if spec.arch.startswith(MODULE):
        place = spec.arch.removeprefix(MODULE)
        return call_factory(place, spec.folder, with_transform=transform in (spec.arch, place))
    pretrained = spec.pretrained and not spec.weights
    return timm_backbone(spec.arch, image_size=size, classes=classes, pretrained=pretrained)


def _fresh_model(spec: EncoderSpec, device: torch.device) -> EmbeddingNet:
    _require_program(spec)
    backbone = _create_backbone(spec, device)
    return EmbeddingNet(backbone, width=_width(backbone, spec), dim=spec.dim)


def _width(backbone: nn.Module, spec: EncoderSpec) -> int:
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


def _load_model(
    spec: EncoderSpec, device: torch.device, *, any_dim: bool = False
) -> tuple[EmbeddingNet | MappedNet, str | None]:
    """The model with its weights, on the CPU but for a program, and what of the weights file it is if not all.

    With `any_dim` its vectors may have any length.
    """
    _require_program(spec)
    if spec.weights is None and not spec.pretrained and not spec.arch.startswith(MODULE):
        raise EncoderProblem(f"encoder {spec.arch!r} has no weights: set weights to a file, or pretrained to true")
    if spec.weights is None or spec.weights.suffix == PROGRAMS.get(spec.arch):
        _refuse_head(spec)
        model = _bare(_create_backbone(spec, device), spec, any_dim=any_dim)
        _require_finite(model, _named(spec))
        return model, None
    if spec.weights.suffix in PROGRAMS.values():
        raise EncoderProblem(
            f"weights {_named(spec)} must be a state dict (.safetensors, .pt, .pth, .ckpt, .bin): remove arch and "
            "module for a program"
        )
    content = read_weights(spec.weights)
    if "map.linear.weight" in content and all(str(name).startswith(("base.", "map.")) for name in content):
        if spec.checkpoint_key is not None:
            raise EncoderProblem(f"weights {_named(spec)} are one encoder with its map: remove checkpoint_key")
        return _mapped_model(spec, state_dicts(content)[""], device), None
    if spec.arch in PROGRAMS:
        raise EncoderProblem(
            f"weights {_named(spec)} hold no map to follow {display_name(spec.arch)}: name that file itself"
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
        module = _create_backbone(spec, device)
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
        raise EncoderProblem(f"weights {_named(spec)} do not hold a map: {error}") from error
    _require_fit(fitted, map_state, spec)
    fitted.load_state_dict(map_state)
    if fitted.outputs != spec.dim:
        raise EncoderProblem(f"weights {_named(spec)} give {fitted.outputs}-d vectors: set dim to that, not {spec.dim}")
    below = replace(spec, dim=fitted.inputs)
    if spec.arch in PROGRAMS:
        base = _bare(_create_backbone(below, device), below)
    else:
        base = _stateful_model(below, base_state, _parts(below, device), device)
    model = MappedNet(base, fitted.requires_grad_(False))
    _require_finite(model, _named(spec))
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
        _refuse_head(spec)
        model = _bare(backbone, spec, any_dim=True)
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
    elif "projection.weight" in state:
        _refuse_head(spec)
        outputs = state["projection.weight"].shape[:1]
        if outputs != (spec.dim,) and not (any_dim and outputs):
            raise EncoderProblem(
                f"weights {_named(spec)} give {outputs[0] if outputs else 0}-d vectors: set dim to that, not {spec.dim}"
            )
        backbone = backbone or _create_backbone(spec, device)
        model = EmbeddingNet(backbone, width=_width(backbone, spec), dim=outputs[0])
    else:
        plain = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
        model, state = _plain_model(spec, plain, parts, device, any_dim=any_dim)
    _require_fit(model, state, spec)
    if not any_dim:
        _require_features(model.dim, spec)
    try:
        model.load_state_dict(state)
    except Exception as error:  # exotic tensors (sparse, quantised, without storage)
        raise EncoderProblem(f"weights {_named(spec)} cannot be used: {one_line(error)}") from error
    _require_finite(model, _named(spec))
    return model


def _plain_model(
    spec: EncoderSpec, state: dict[str, torch.Tensor], parts: _Parts, device: torch.device, *, any_dim: bool
) -> tuple[EmbeddingNet, dict[str, torch.Tensor]]:
    """A model, and the state it needs under its own names, for a state dict with timm's or the factory's names."""
    head: Head = "none"
    if parts.timm is None:
        _refuse_head(spec)
    else:
        head = _head(spec, state, parts.timm)
        if head == "none":
            state = {name: tensor for name, tensor in state.items() if not parts.timm.in_head(name)}
    classes = 0
    if parts.timm is not None and head == "classifier":
        classes = _classes(spec, parts.timm.outputs(state), any_dim=any_dim)
    backbone = parts.module or _create_backbone(spec, device, classes=classes)
    model = _bare(backbone, spec, head=head, any_dim=True)
    return model, {f"backbone.{name}": tensor for name, tensor in state.items()}


def _head(spec: EncoderSpec, state: Mapping[str, torch.Tensor], layout: TimmLayout) -> Literal["classifier", "none"]:
    """What gives the embedding: as declared, or else the classifier where it has `dim` outputs."""
    replaced = [name for name in state if layout.in_head(name) and name not in layout.head]
    if replaced and spec.head != "none":
        raise EncoderProblem(
            f"weights {_named(spec)} hold {', '.join(replaced[:3])} in place of the classifier of "
            f"{display_name(spec.arch)}: set head to none for the pooled features below it, or give a module that "
            "builds the whole network"
        )
    return spec.head or ("classifier" if layout.outputs(state) == {spec.dim} else "none")


def _classes(spec: EncoderSpec, outputs: set[int], *, any_dim: bool) -> int:
    """How many outputs the classifier has that is to give the embedding."""
    if len(outputs) != 1:
        found = f"classifiers of {' and '.join(map(str, sorted(outputs)))} outputs" if outputs else "no classifier"
        raise EncoderProblem(f"weights {_named(spec)} hold {found}: set head to none for the pooled features")
    (classes,) = outputs
    if classes != spec.dim and not any_dim:
        raise EncoderProblem(
            f"the classifier in weights {_named(spec)} has {classes} outputs: set dim to {classes}, or head to none "
            "for the pooled features"
        )
    return classes


def _refuse_head(spec: EncoderSpec) -> None:
    """Only a plain timm state dict leaves a choice of what the embedding is."""
    if spec.head is not None:
        raise EncoderProblem(
            f"head: {spec.head} is for the state dict of a timm model, which {_named(spec)} is not: remove head"
        )


def _bare(backbone: nn.Module, spec: EncoderSpec, *, head: Head = "none", any_dim: bool = False) -> EmbeddingNet:
    """The backbone alone: what it gives is the embedding."""
    width = _width(backbone, spec)
    if not any_dim:
        _require_features(width, spec)
    return EmbeddingNet(backbone, width=width, dim=width, head=head)


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
            f"weights {_named(spec)} do not fit {display_name(spec.arch)}: {one_line('; '.join(found))}"
        )


def _require_finite(model: nn.Module, named: str) -> None:
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise EncoderProblem(f"weights {named} hold numbers that are not finite, in {name}")


def _require_features(width: int, spec: EncoderSpec) -> None:
    if width != spec.dim:
        raise EncoderProblem(
            f"{display_name(spec.arch)} gives {width}-d features and its weights have no layer of {spec.dim} outputs: "
            f"set dim to {width}"
        )


def _require_dim(spec: EncoderSpec) -> None:
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


def _weights_sha256(model: nn.Module) -> str:
    """Hash of names, types, shapes and values, so that it is the same for every file format that holds them.

    Of a program it is that of its file's bytes.
    """
    state, program = model.state_dict(), _program(model)
    if program is not None and not state:
        return program.sha256
    digest = hashlib.sha256()
    if program is not None:
        digest.update(f"program {program.sha256}\n".encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _program(model: nn.Module) -> Program | None:
    return next((part for part in model.modules() if isinstance(part, Program)), None)


def _copy_program(program: Program, path: Path) -> None:
    if path.exists() and path.samefile(program.path):
        return
    data = program.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != program.sha256:
        raise EncoderMismatch(f"{program.named} was changed while it was in use: put it back and try again")
    write_whole(path, data)


def _require_program(spec: EncoderSpec) -> None:
    """Refuses an architecture that is a file without that file, or an encoder made around it."""
    if spec.arch in PROGRAMS:
        suffix = PROGRAMS[spec.arch]
        if spec.weights is None or spec.weights.suffix not in (suffix, ".safetensors"):
            raise EncoderProblem(
                f"{display_name(spec.arch)} has no file: set weights to a {suffix} file, not {spec.weights}"
            )


def _make_manifest(spec: EncoderSpec, model: EmbeddingNet | MappedNet, fingerprint: NDArray[np.float32]) -> Manifest:
    return Manifest.make(
        arch=spec.arch,
        dim=spec.dim,
        head=model.head,
        preprocessing=spec.preprocessing,
        weights_sha256=_weights_sha256(model),
        fingerprint=fingerprint,
        map=model.map.kind if isinstance(model, MappedNet) else None,
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


def manifest_path(weights: Path) -> Path:
    """Where the manifest of these weights lies: beside them."""
    return weights.with_suffix(".json")


def _named(spec: EncoderSpec) -> str:
    if spec.weights:
        return repr(str(spec.weights))
    return display_name(spec.arch) if spec.arch.startswith(MODULE) else f"timm's hub for {spec.arch!r}"
