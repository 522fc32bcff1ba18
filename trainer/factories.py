"""Factories: functions of the user that return a network, a transform of images, or both."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from migrator.trainer.errors import EncoderProblem
from migrator.trainer.text import one_line
from migrator.trainer.torchvision_cpu import import_torchvision

if TYPE_CHECKING:
    from pathlib import Path

MODULE = "module:"
Factory = Callable[[], Any]
Transform = Callable[[Any], Any]
"""A picture -> a tensor; see `migrator.trainer.images.transforms`."""
_transforms: dict[Factory, Transform] = {}
"""What factories brought. Each image that is prepared asks for it."""
_unused: dict[Factory, nn.Module] = {}
"""Modules that came with a transform and are not used yet: each is returned once."""
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
    """The factory if its module is imported already. Safe in many threads, and quick: called for each image."""
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
        with contextlib.suppress(ImportError, RuntimeError):  # a factory that needs it raises the reason itself
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
    return cast("Factory", factory)


def _called(factory: Factory, place: str) -> Any:
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return factory()
        except (Exception, SystemExit) as error:  # another's code
            raise EncoderProblem(f"factory {place!r} failed: {_raised(error)}") from error


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
