"""timm, imported so that it also works beside a CPU-only torch.

timm needs Python transforms of torchvision. The torchvision wheel on PyPI is compiled against the CUDA build of torch;
beside a CPU-only torch its compiled part does not load, and `import torchvision` stops with `operator torchvision::nms
does not exist`, because it describes operators that were never defined. Neither timm nor anything here calls them, so
declaring their schemas is enough. Where the compiled part does load, nothing is declared.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from typing import Any

from trainer.errors import EncoderProblem

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_lock = threading.Lock()
_declared: list[Any] = []  # a torch.library.Library withdraws its schemas when it is collected


def import_timm() -> ModuleType:
    """The `timm` package. The only way in which this package imports it. Raises EncoderProblem where it cannot be."""
    import torch

    with _lock:
        try:
            try:
                importlib.import_module("torchvision")
            except RuntimeError as error:
                if _declared or "torchvision::" not in str(error):
                    raise
                library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in _SCHEMAS:
                    library.define(schema)
                _declared.append(library)
            import timm
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise EncoderProblem(
                f"timm cannot be imported ({reason}): install timm and a torchvision of torch's version"
            ) from error
    return timm
