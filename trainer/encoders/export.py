"""An encoder as a file that runs elsewhere, proved to give the same vectors."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from migrator.trainer.encoders.architecture import PROGRAMS, display_name
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.manifest import FINGERPRINT_AGREEMENT, manifest_path
from migrator.trainer.encoders.networks import MappedNet
from migrator.trainer.encoders.programs import Program
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import EncoderMismatch, EncoderProblem
from migrator.trainer.factories import MODULE
from migrator.trainer.files import sync_folder
from migrator.trainer.images.preprocessing import fingerprint_image
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from migrator.trainer.encoders.encoder import Encoder

Format = Literal["pt2", "onnx", "safetensors"]

MAX_DIFFERENCE = 1e-4
"""Greatest difference between two numbers of a vector and of its export's. Rounding stays below 1e-5."""
MAX_BATCH = 1024
"""Pictures that an exported program takes at once; migrator gives it more in parts."""
MAX_ONNX_BYTES = 2**31 - 2**20
"""What one ONNX file can hold: protobuf's limit, less the graph."""
_RANDOM_PICTURES = 4


@dataclass(frozen=True)
class Exported:
    """What was written, and how its vectors compare with the encoder's own."""

    encoder: Encoder
    """The export, loaded again."""
    spec: EncoderSpec
    """How it is declared."""
    pictures: int
    cosine: float
    """The least one of a picture's two vectors."""
    difference: float
    """The greatest one of two numbers."""


class UnitVectors(nn.Module):
    """A network with its vectors scaled to unit length: (n, 3, H, W) normalised float32 -> (n, D)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return F.normalize(self.network(images).float())


def export_encoder(encoder: Encoder, spec: EncoderSpec, path: Path, form: Format) -> Exported:
    """Writes `encoder`, which `spec` declares and which lies on the CPU, to `path`, and its manifest beside it.

    A .pt2 or .onnx file takes what `Preprocessing.prepare` gives after mean and standard deviation, (n, 3, H, W)
    float32 for any n, and gives (n, dim) of unit length. A .safetensors file is what training writes.

    Raises EncoderProblem for what cannot be exported, or where something lies at `path` already, and EncoderMismatch
    where the export gives other vectors; then nothing is left.
    """
    _require_exportable(encoder, path, form)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            draft = Path(folder, path.name)
            declared = _write(encoder, spec, draft, form)
            again = load_encoder(declared, device="cpu")
            manifest_path(draft).write_text(again.manifest.to_json(), encoding="utf-8")
            pictures = _pictures()
            cosine, difference = _compare(encoder, again, pictures)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".json"):  # the manifest last
                file.replace(path.parent / file.name)
            sync_folder(path.parent)
    except OSError as error:
        raise EncoderProblem(f"encoder cannot be written to {str(path)!r}: {error.strerror or error}") from error
    return Exported(again, replace(declared, weights=path), len(pictures), cosine, difference)


def _require_exportable(encoder: Encoder, path: Path, form: Format) -> None:
    if path.suffix != f".{form}":
        raise EncoderProblem(f"{str(path)!r} does not end in .{form}: give it that suffix, or another format")
    if not path.parent.is_dir():
        raise EncoderProblem(f"there is no folder {str(path.parent)!r}: make it first")
    for file in (path, manifest_path(path)):
        if file.exists():
            raise EncoderProblem(f"{str(file)!r} is there already: choose another name, an encoder in use may need it")
    program = next((part for part in encoder.model.modules() if isinstance(part, Program)), None)
    mapped = isinstance(encoder.model, MappedNet)
    if program is not None and not (mapped and form == "safetensors"):
        what = display_name(f"file:{program.path.suffix.removeprefix('.')}")
        if mapped:
            raise EncoderProblem(
                f"encoder {encoder.id} is {what} with a map behind it, which cannot be one file: use safetensors, "
                "which copies the program beside the map"
            )
        raise EncoderProblem(f"encoder {encoder.id} is {what} {str(program.path)!r} already: copy that file")
    if form == "onnx":
        if importlib.util.find_spec("onnxscript") is None or importlib.util.find_spec("onnxruntime") is None:
            raise EncoderProblem("onnx needs onnxscript and onnxruntime: pip install 'advbct-migrator[onnx]'")
        octets = sum(tensor.numel() * tensor.element_size() for tensor in encoder.model.state_dict().values())
        if octets > MAX_ONNX_BYTES:
            raise EncoderProblem(
                f"encoder {encoder.id} has {octets / 2**30:.1f} GiB of weights, more than ONNX can hold: use pt2"
            )


def _write(encoder: Encoder, spec: EncoderSpec, path: Path, form: Format) -> EncoderSpec:
    """Writes the file, and returns how the encoder in it is declared."""
    if form == "safetensors":
        save_encoder(encoder.model, spec, path)
        return replace(spec, weights=path, pretrained=False, checkpoint_key=None)
    network = copy.deepcopy(encoder.model).float().cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    network = UnitVectors(network).eval().requires_grad_(False)
    height, width = spec.preprocessing.size
    example = (torch.zeros(2, 3, height, width),)
    shapes = ({0: torch.export.Dim("n", min=1, max=MAX_BATCH)},)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(network, example, dynamic_shapes=shapes)
            if form == "pt2":
                torch.export.save(program, path)
            else:
                torch.onnx.export(
                    program, (), path, dynamo=True, external_data=False, verbose=False,
                    input_names=["images"], output_names=["vectors"],
                )  # fmt: skip
    except Exception as error:  # tracers raise all kinds over networks that they cannot follow
        raise EncoderProblem(
            f"{display_name(spec.arch)} cannot be exported as {form} for any number of pictures: {one_line(error)}"
        ) from error
    preprocessing = spec.preprocessing
    if preprocessing.transform is not None:  # a factory's own transform is now that of no factory of the encoder
        preprocessing = replace(preprocessing, transform=preprocessing.transform.removeprefix(MODULE))
    arch = next(arch for arch, suffix in PROGRAMS.items() if suffix == path.suffix)
    return EncoderSpec(arch, encoder.dim, preprocessing, weights=path, folder=spec.folder)


def _pictures() -> Sequence[Image.Image]:
    """The fingerprint image in several positions and sizes, and random ones."""
    from PIL import Image

    shape = fingerprint_image()
    rng = np.random.default_rng(0)
    noise = [
        Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 300, 2), 3), np.uint8)) for _ in range(_RANDOM_PICTURES)
    ]
    return [shape, shape.rotate(90, expand=True), shape.crop((20, 30, 150, 120)), shape.resize((500, 90)), *noise]


def _compare(encoder: Encoder, again: Encoder, pictures: Sequence[Image.Image]) -> tuple[float, float]:
    """Least cosine and greatest difference, of all pictures in one batch and of each alone. Raises EncoderMismatch."""
    inputs = np.stack([encoder.prepare(picture) for picture in pictures])
    own = encoder.encode(inputs)
    others: list[NDArray[Any]] = [
        again.encode(np.stack([again.prepare(picture) for picture in pictures])),
        np.concatenate([again.encode(image[None]) for image in inputs]),
    ]
    cosine = min(float((own * other).sum(axis=1).min()) for other in others)
    difference = max(float(np.abs(own - other).max()) for other in others)
    if not (cosine >= FINGERPRINT_AGREEMENT and difference <= MAX_DIFFERENCE):
        raise EncoderMismatch(
            f"the export gives other vectors than encoder {encoder.id} (least cosine {cosine:.6f}, greatest difference "
            f"{difference:.2g}), and was not kept: its network depends on more than the pictures"
        )
    return cosine, difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print: what counts is raised."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
