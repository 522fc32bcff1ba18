"""Reading a weights file without running anything that is in it."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from migrator.trainer.encoders.checkpoints import state_dicts
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from pathlib import Path

_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""How a file begins, after its pickle protocol, that torch before 1.6 wrote."""

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"),
    (b"<", "is a web page, not weights: download the file itself"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes them: export the model to ONNX"),
    (b"GGUF", "is a GGUF file: take the weights of the same model as .safetensors"),
    (b"\x93NUMPY", "is a NumPy array: save a state dict"),
)


def read_weights(path: Path) -> Mapping[Any, Any]:
    """What a weights file holds: a state dict, or mappings with one or several among other values.

    Nothing in it is run: of pickled objects other than tensors, numbers and texts only inert stand-ins are made.
    Raises EncoderProblem for what is not there, is damaged, or is no checkpoint.
    """
    named = f"weights {str(path)!r}"
    if not path.is_file():
        reason = (
            "is a folder: name a file in it" if path.is_dir() else "is not there: check weights in the configuration"
        )
        raise EncoderProblem(f"{named} {reason}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise EncoderProblem(f"{named} cannot be read: {error.strerror}") from error
    if path.suffix == ".safetensors" and not head.startswith(b"version https://git-lfs"):
        return _read_safetensors(path, named)
    for magic, reason in _FOREIGN:
        if head.lstrip().startswith(magic):
            raise EncoderProblem(f"{named} {reason}")
    if head[257:262] == b"ustar":
        raise EncoderProblem(f"{named} is a tar archive: unpack it, and name the weights in it")
    if path.suffix == ".json" or head.lstrip().startswith(b"{"):
        raise EncoderProblem(_json(path, named))
    if head[8:9] == b"{":
        return _read_safetensors(path, named)
    if head.startswith(b"\x80") and _TORCH_MAGIC not in head[:16]:
        raise EncoderProblem(f"{named} is a pickle of Python objects, which are not loaded: save it with torch.save")
    if head.startswith(b"PK"):
        _check_archive(path, named)
    elif head[:1] != b"\x80":
        empty = "is empty" if not head else "is no weights file of torch or safetensors"
        raise EncoderProblem(f"{named} cannot be loaded, it may be damaged: it {empty}")
    return _read_pickled(path, named)


def _read_safetensors(path: Path, named: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # readers of damaged files raise all kinds
        raise EncoderProblem(f"{named} cannot be loaded, it may be damaged: {one_line(error)}") from error


def _json(path: Path, named: str) -> str:
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{named} is a JSON file, not weights: name the .safetensors, .pt, .pth, .ckpt or .bin file"
    merge = "save_file({k: v for f in FILES for k, v in load_file(f).items()}, 'weights.safetensors')"
    return f"{named} is the index of {len(shards)} files: put them together, with safetensors.torch {merge}"


def _check_archive(path: Path, named: str) -> None:
    """Refuses zip archives that are not of `torch.save`, saying what they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry.partition("/")[2] or entry for entry in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise EncoderProblem(f"{named} cannot be loaded, it may be damaged: {one_line(error)}") from error
    if "constants.pkl" in entries and any(entry.startswith("code/") for entry in entries):
        reason = (
            "is a TorchScript program: write its weights with torch.save(torch.jit.load(FILE).state_dict(), "
            "'weights.pt'), or give a module whose factory returns torch.jit.load(FILE)"
        )
    elif any(entry.endswith(("models/model.json", "serialized_exported_program.json")) for entry in entries):
        reason = "is a program of torch.export: rename it to .pt2, and leave arch and module away"
    elif entries and all(entry.endswith(".npy") for entry in entries):
        reason = "is a NumPy archive: save a state dict"
    elif "data.pkl" not in entries:
        reason = "is a zip archive without weights of torch.save: unpack it, and name the weights in it"
    else:
        return
    raise EncoderProblem(f"{named} {reason}")


def _read_pickled(path: Path, named: str) -> Mapping[Any, Any]:
    """What `torch.save` wrote, by torch's own reader that runs nothing."""
    try:
        objects = _objects(path)
        content = _load(path, objects)
    except pickle.UnpicklingError as error:
        raise EncoderProblem(
            f"{named} holds Python objects that are not loaded ({one_line(error)}): save its state_dict() alone"
        ) from error
    except Exception as error:  # readers of damaged files raise all kinds
        raise EncoderProblem(f"{named} cannot be loaded, it may be damaged: {one_line(error)}") from error
    whole = next((name for name, value in [("", content), *_items(content)] if "_modules" in _attributes(value)), None)
    if whole is not None:
        saved = f"torch.load(FILE, weights_only=False){f'[{whole!r}]' if whole else ''}.state_dict()"
        raise EncoderProblem(
            f"{named} holds a whole model as Python objects ({', '.join(objects[:2])}), which are not loaded: where "
            f"its code is installed, torch.save({saved}, 'weights.pt')"
        )
    if not isinstance(content, Mapping) or (objects and not state_dicts(content)):
        held = f"Python objects ({', '.join(objects[:3])})" if objects else f"a {type(content).__name__}"
        raise EncoderProblem(f"{named} is not a state dict, it holds {held}: save its state_dict()")
    return content


def _items(content: Any) -> list[tuple[Any, Any]]:
    return list(content.items()) if isinstance(content, Mapping) else []


def _attributes(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def _load(path: Path, objects: list[str]) -> Any:
    """With stand-ins for `objects`. Which of them are mappings does not show in the file, so three guesses are made."""
    guesses: tuple[Callable[[str], bool], ...] = (
        lambda name: name.endswith(("dict", "Dict", "Box", "CfgNode")),
        lambda _: False,
        lambda _: True,
    )
    for guess in guesses[: 3 if objects else 1]:
        stand_ins: list[Any] = [(_stand_in(name, mapping=guess(name)), name) for name in objects]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")  # about foreign pickle protocols and archives; what counts is raised
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, TypeError, ValueError, AttributeError) as error:
            problem = error
    if objects:
        raise pickle.UnpicklingError(f"{', '.join(objects[:3])}") from problem
    raise problem


def _stand_in(name: str, *, mapping: bool) -> Any:
    """Takes the place of a class or function of that name in a pickle: can be called and filled, and does nothing."""

    class StandIn:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            if name.endswith(("deque", "List")):
                return []
            return OrderedDict() if mapping else super().__new__(cls)

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, dict):
                self.__dict__.update(state)

    return StandIn


def _objects(path: Path) -> list[str]:
    """Names of the classes and functions that a file refers to and torch does not allow by itself."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            with zipfile.ZipFile(path) as archive:
                data = next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))
                names = _globals(io.BytesIO(archive.read(data)))
        else:  # torch before 1.6: three small pickles, the object, its storages
            file.seek(0)
            names = [name for _ in range(4) for name in _globals(file)]
    unpickler = torch._weights_only_unpickler
    allowed = unpickler._get_allowed_globals().keys() | unpickler._get_user_allowed_globals().keys()
    return [name for name in dict.fromkeys(names) if name not in allowed]


def _globals(file: Any) -> list[str]:
    names = []
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.append(f"{module}.{name}")
    return names
