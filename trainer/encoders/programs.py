"""Networks in .pt2 and .onnx files, which run as they are and cannot be trained."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from migrator.trainer.encoders.quiet import quiet_loggers
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.text import one_line
from migrator.trainer.torchvision_cpu import import_torchvision

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[[Tensor], Sequence[Tensor]]
"""(n, 3, H, W) on the program's device -> its outputs."""


class Program(nn.Module):
    """A network in a .pt2 or .onnx file. It has no parameters here: it runs, and is not trained.

    forward: (n, 3, H, W) normalised float32 -> (n, d) float32 on the same device. A program made for a fixed number of
    pictures gets them in parts of that size; one whose input's shape ends in 3, channels last; one that takes uint8,
    bytes, if the preprocessing leaves them whole. Raises EncoderProblem where it fails.
    """

    def __init__(self, path: Path, *, image_size: int | tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.path = path
        self.device = device
        self.named = f"program {str(path)!r}"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise EncoderProblem(f"{self.named} is not there: check weights in the configuration") from error
        except OSError as error:
            raise EncoderProblem(f"{self.named} cannot be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(data).hexdigest()
        opened = _open_exported if path.suffix == ".pt2" else _open_onnx
        self._run, shape, self._dtype, limits = opened(data, self.named, device)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._channels_last = not _takes(shape, 3, height, width) and _takes(shape, height, width, 3)
        if not self._channels_last and not _takes(shape, 3, height, width):
            raise EncoderProblem(
                f"{self.named} takes an input of shape {_shape(shape)}, not (n, 3, {height}, {width}) or (n, {height}, "
                f"{width}, 3): {_other_shape(shape)}"
            )
        if self._dtype is None:
            raise EncoderProblem(
                f"{self.named} takes neither floating-point numbers nor bytes: export it with a float32 or uint8 input"
            )
        has_channels = isinstance(shape[1], int) or isinstance(shape[3], int)
        self._hint = (
            "" if has_channels else "; if it takes channels last, export it with the input's shape (n, H, W, 3) in it"
        )
        self._least, self._most = limits
        self._require_rows_apart(height, width)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """Itself: nothing in it changes."""
        return self

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        parts = [self._part(part) for part in images.split(self._most or len(images))]
        return torch.cat(parts).to(images.device)

    def _part(self, images: Tensor) -> Tensor:
        n = len(images)
        padded = torch.cat([images, images[-1:].expand(self._least - n, -1, -1, -1)]) if n < self._least else images
        try:
            outputs = self._run(self._as_input(padded.to(self.device)).contiguous())
        except (torch.OutOfMemoryError, EncoderProblem):
            raise
        except Exception as error:  # whatever a foreign program's kernels and guards raise
            raise EncoderProblem(
                f"{self.named} fails on {len(padded)} pictures: {one_line(error)}{self._hint}"
            ) from error
        rows = [output for output in outputs if output.ndim == 2] if len(outputs) > 1 else outputs
        if len(rows) != 1 or rows[0].ndim != 2 or len(rows[0]) != len(padded):
            raise EncoderProblem(
                f"{self.named} gives {', '.join(str(_shape(output.shape)) for output in outputs) or 'nothing'} for "
                f"{len(padded)} pictures: export it so that one output is (n, d), a row for each picture"
            )
        return rows[0][:n].float()

    def _as_input(self, images: Tensor) -> Tensor:
        """Pictures in the program's own order of axes and type."""
        if self._dtype == torch.uint8:
            whole = images.round()
            if float((images - whole).abs().max()) > 0.01 or float(whole.min()) < 0 or float(whole.max()) > 255:
                raise EncoderProblem(
                    f"{self.named} takes bytes from 0 to 255: set mean to [0, 0, 0] and std to [0.003921569, "
                    "0.003921569, 0.003921569], which leaves them as they are"
                )
            images = whole
        return (images.permute(0, 2, 3, 1) if self._channels_last else images).to(self._dtype)

    def _require_rows_apart(self, height: int, width: int) -> None:
        """Refuses a program whose row depends on its neighbours or on chance, as one exported while training does."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, 3, height, width, generator=generator)
        if self._dtype == torch.uint8:
            images = (images * 50 + 128).round().clamp(0, 255)
        with torch.no_grad():
            alone, among = self(images[:1]), self(images)[:1]
        if float((alone - among).norm()) > 0.01 * float(among.norm()):
            raise EncoderProblem(
                f"{self.named} gives a picture another vector when it comes with others: export it from a model in "
                "evaluation mode, model.eval()"
            )


def _takes(shape: Sequence[Any], *sides: int) -> bool:
    """Whether an input of this shape, in which any side may be open, takes pictures of these sides."""
    return len(shape) == 4 and not any(isinstance(n, int) and n != m for n, m in zip(shape[1:], sides, strict=True))


def _other_shape(shape: Sequence[Any]) -> str:
    """What to do about an input of another shape."""
    if len(shape) == 4 and 3 in (shape[1], shape[3]):
        return "set image_size to its own, or export it for this one"
    if len(shape) == 4 and {1, 4} & {shape[1], shape[3]}:
        return "pictures have three channels here: export it with a first layer that turns RGB into its own"
    return "export it for a batch of RGB pictures"


def _open_exported(
    data: bytes, named: str, device: torch.device
) -> tuple[Run, Sequence[Any], torch.dtype | None, tuple[int, int | None]]:
    from torch.export.passes import move_to_device_pass

    operators: list[tuple[str, str]] = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()  # torch does not verify the checksums
            operators = _operators(archive)
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        if any(namespace == "torchvision" for namespace, _ in operators):
            with contextlib.suppress(ImportError, RuntimeError):  # what is then missing is named below
                import_torchvision()
        with quiet_loggers("torch.export", "torch._export"):
            exported = torch.export.load(io.BytesIO(data))
            exported = move_to_device_pass(exported, device)
            network = exported.module()
    except Exception as error:  # readers of damaged files raise all kinds
        missing = [f"{space}.{name}" for space, name in operators if not hasattr(getattr(torch.ops, space), name)]
        if missing:
            raise EncoderProblem(
                f"{named} uses the operators {', '.join(missing[:3])}, which are not installed here: install the "
                "package that has them, built for this torch, or export the model without them"
            ) from error
        raise EncoderProblem(
            f"{named} cannot be loaded, it may be damaged or from another version of torch: {one_line(error)}"
        ) from error
    names = exported.graph_signature.user_inputs
    inputs = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise EncoderProblem(f"{named} takes {len(inputs)} inputs: export it with one, the pictures")
    shape: Sequence[Any] = inputs[0].shape
    dtype = inputs[0].dtype
    least, most = 1, None
    if shape and isinstance(shape[0], int):
        least = most = shape[0]
    elif shape:
        allowed = exported.range_constraints.get(shape[0].node.expr)
        if allowed is not None:
            least = max(1, int(allowed.lower))
            most = int(allowed.upper) if allowed.upper < 2**31 else None

    def run(images: Tensor) -> Sequence[Tensor]:
        leaves = torch.utils._pytree.tree_leaves(network(images))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    return run, shape, dtype if dtype.is_floating_point or dtype == torch.uint8 else None, (least, most)


def _operators(archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Namespace and name of the operators that an exported program names, but for torch's own."""
    texts = [archive.read(entry).decode(errors="replace") for entry in archive.namelist() if entry.endswith(".json")]
    found = {match for text in texts for match in re.findall(r"\btorch\.ops\.(\w+)\.(\w+)", text)}
    return sorted((space, name) for space, name in found if space not in ("aten", "higher_order", "prim", "prims"))


_ONNX_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}


def _open_onnx(
    data: bytes, named: str, device: torch.device
) -> tuple[Run, Sequence[Any], torch.dtype | None, tuple[int, int | None]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise EncoderProblem(f"{named} needs onnxruntime: pip install 'advbct-migrator[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what counts is raised
    options.intra_op_num_threads = torch.get_num_threads()  # who limits torch's threads limits these too
    # Weights in a file of their own would be no part of the id: the key leads to a folder that cannot be.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null/none")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # readers of damaged files raise all kinds
        hint = ": save it in one file (external_data=False)" if "/dev/null" in str(error) else ""
        raise EncoderProblem(f"{named} cannot be loaded, it may be damaged{hint or ': ' + one_line(error)}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise EncoderProblem(f"{named} takes {len(inputs)} inputs: export it with one, the pictures")
    name, shape = inputs[0].name, inputs[0].shape
    fixed = shape[0] if shape and isinstance(shape[0], int) else None

    def run(images: Tensor) -> Sequence[Tensor]:
        outputs = session.run(None, {name: images.cpu().numpy()})
        return [torch.from_numpy(output).to(device) for output in outputs if isinstance(output, np.ndarray)]

    return run, shape, _ONNX_TYPES.get(inputs[0].type), (fixed or 1, fixed)


def _shape(shape: Sequence[Any]) -> str:
    return "(" + ", ".join(str(n) if isinstance(n, int) else "n" for n in shape) + ")"
