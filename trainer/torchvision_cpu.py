"""torchvision, imported so that it and what needs it (timm, open_clip, factories) work beside a CPU-only torch.

The torchvision wheel on PyPI is compiled against the CUDA build of torch; beside a CPU-only torch its compiled part
does not load, and `import torchvision` stops with `operator torchvision::nms does not exist`, because it describes
operators that were never defined. Neither timm nor anything here calls them, so declaring their schemas is enough.
Where the compiled part does load, nothing is declared.
"""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from migrator.trainer.errors import EncoderProblem

if TYPE_CHECKING:
    from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_lock = threading.Lock()
_declared: list[Any] = []  # a torch.library.Library withdraws its schemas when it is collected


def import_torchvision() -> None:
    """Imports torchvision, after which everything else in this process can. To be called before anyone else's import.

    Raises ImportError where it is not installed, RuntimeError where it does not fit torch for another reason.
    """
    import torch

    with _lock:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if _declared or "torchvision::" not in str(error):
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                library.define(schema)
            _declared.append(library)
            importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """The `timm` package. The only way in which this package imports it. Raises EncoderProblem where that fails."""
    try:
        import_torchvision()
        import timm
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EncoderProblem(
            f"timm cannot be imported ({reason}): install timm and a torchvision of torch's version"
        ) from error
    return timm
