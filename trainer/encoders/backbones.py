"""The network of an encoder, from wherever it comes.

Its architecture is written as one text, in the configuration's terms and in manifests:

- `resnet18`: a timm architecture
- `module:package.module:factory`: a function that returns an `nn.Module`
- `file:pt2`: a program exported by `torch.export`
- `file:onnx`: an ONNX model, run by onnxruntime

The last two are files that run as they are and cannot be trained.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import io
import logging
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from migrator.trainer.errors import EncoderProblem
from migrator.trainer.torchvision_cpu import import_timm, import_torchvision

MODULE = "module:"
PROGRAMS = {"file:pt2": ".pt2", "file:onnx": ".onnx"}
"""Architectures that are files, and their suffixes."""


def display_name(arch: str) -> str:
    """The architecture as messages call it."""
    if arch in PROGRAMS:
        return "the exported program" if arch == "file:pt2" else "the ONNX model"
    if arch.startswith(MODULE):
        return f"factory {arch.removeprefix(MODULE)!r}"
    return f"architecture {arch!r}"


def one_line(foreign: object) -> str:
    """A foreign exception or text as one line of bounded length."""
    return " ".join(str(foreign).split())[:300] or type(foreign).__name__


# --- timm -----------------------------------------------------------------------------------------------------------


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
        """The numbers of classes that the head of a state dict tells apart: one, unless its parts disagree."""
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

    It may also resample position embeddings to another image size, which nobody asked for: then None.
    """
    entry = import_timm().models.model_entrypoint(arch)
    convert = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        with _quiet("timm"):
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


# --- factories ------------------------------------------------------------------------------------------------------


Factory = Callable[[], Any]
Transform = Callable[[Any], Any]
"""A picture -> a tensor; see `migrator.trainer.images.transforms`."""

_transforms: dict[Factory, Transform] = {}
"""What factories brought. Each image that is prepared asks for it."""
_unused: dict[Factory, nn.Module] = {}
"""Modules that came with a transform before one was asked for: each is given out once."""
_lock = threading.Lock()


def call_factory(place: str, folder: Path | None, *, with_transform: bool = False) -> nn.Module:
    """The module that `package.module:factory` returns, as float32. It is called without arguments.

    Its module is looked for in `folder` first, then among the installed packages. This runs the factory's code.
    Raises EncoderProblem where it is not there, fails, or returns something else; also for a pair (module, transform)
    where the encoder's preprocessing is not that transform.
    """
    factory = _find_factory(place, folder)
    with _lock:
        module = _unused.pop(factory, None)
    if module is None:
        returned = _called(factory, place)
        if _is_pair(returned) and not with_transform:
            raise EncoderProblem(
                f"factory {place!r} returns a module and a transform, but the encoder is declared with image_size: "
                "remove image_size, mean, std and resize to use the transform, or let it return the module alone"
            )
        module = returned[0] if _is_pair(returned) else returned
    if not isinstance(module, nn.Module):
        raise EncoderProblem(f"factory {place!r} returns a {type(module).__name__}: it must return a torch.nn.Module")
    return module.float()


def call_transform_factory(name: str, folder: Path | None) -> Transform:
    """The transform that a factory brings, called once in a process: alone, or in a pair (module, transform).

    `module:package.module:factory` must return the pair. Raises EncoderProblem as `call_factory` does.
    """
    place = name.removeprefix(MODULE)
    factory = _loaded_factory(place) or _find_factory(place, folder)
    with _lock:
        if factory not in _transforms:
            returned = _called(factory, place)
            if _is_pair(returned):
                _unused[factory], _transforms[factory] = returned
            elif name.startswith(MODULE):
                raise EncoderProblem(
                    f"factory {place!r} returns a {type(returned).__name__} without a transform: give image_size (and "
                    "mean, std, resize), or let it return (module, transform)"
                )
            elif callable(returned):
                _transforms[factory] = returned
            else:
                raise EncoderProblem(
                    f"factory {place!r} returns a {type(returned).__name__}: it must return a callable from a picture "
                    "to a float tensor (3, height, width)"
                )
        return _transforms[factory]


def _is_pair(returned: Any) -> bool:
    return (
        isinstance(returned, tuple)
        and len(returned) == 2
        and isinstance(returned[0], nn.Module)
        and callable(returned[1])
    )


def _loaded_factory(place: str) -> Factory | None:
    """The factory if its module is imported already. Safe in many threads, and quick: asked for each image."""
    module_name, _, name = place.partition(":")
    factory = getattr(sys.modules.get(module_name), name, None)
    return factory if factory in _transforms else None


def _find_factory(place: str, folder: Path | None) -> Factory:
    named = f"factory {place!r}"
    module_name, _, name = place.partition(":")
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # and stays: a factory's module may import its neighbours later
    # What is printed must not get among the results that a command prints.
    with contextlib.redirect_stdout(sys.stderr):
        with contextlib.suppress(ImportError, RuntimeError):  # a factory that needs it tells why it cannot have it
            import_torchvision()
        try:
            importlib.invalidate_caches()
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name + ".").startswith(error.name + "."):
                where = f"in {folder} or among the installed packages" if folder else "among the installed packages"
                raise EncoderProblem(f"{named}: there is no module {error.name!r} {where}") from error
            raise EncoderProblem(f"{named} cannot be imported: {one_line(error)}") from error
        except (Exception, SystemExit) as error:  # another's code
            raise EncoderProblem(f"{named} cannot be imported: {_raised(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        found = f"is a {type(factory).__name__}" if factory is not None else "is not"
        raise EncoderProblem(f"{named} {found} in {getattr(module, '__file__', module_name)}: name a function")
    return cast(Factory, factory)


def _called(factory: Factory, place: str) -> Any:
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return factory()
        except (Exception, SystemExit) as error:  # another's code
            raise EncoderProblem(f"factory {place!r} failed: {_raised(error)}") from error


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


# --- programs -------------------------------------------------------------------------------------------------------

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
            damaged = archive.testzip()  # torch does not look at the checksums
            operators = _operators(archive)
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        if any(namespace == "torchvision" for namespace, _ in operators):
            with contextlib.suppress(ImportError, RuntimeError):  # what is then missing is named below
                import_torchvision()
        with _quiet("torch.export", "torch._export"):
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


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Without the tracebacks and warnings that torch prints for its own sake: what counts is raised."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


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
