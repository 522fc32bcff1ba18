"""The architecture of an encoder, written as one text, in the configuration's terms and in manifests.

- `resnet18`: a timm architecture
- `module:package.module:factory`: a function that returns an `nn.Module` (`migrator.trainer.factories`)
- `file:pt2`: a program exported by `torch.export`
- `file:onnx`: an ONNX model, run by onnxruntime

The last two are files that run as they are and cannot be trained (`encoders.programs`).
"""

from __future__ import annotations

from migrator.trainer.factories import MODULE

PROGRAMS = {"file:pt2": ".pt2", "file:onnx": ".onnx"}
"""Architectures that are files, and their suffixes."""


def display_name(arch: str) -> str:
    """The architecture as messages call it."""
    if arch in PROGRAMS:
        return "the exported program" if arch == "file:pt2" else "the ONNX model"
    if arch.startswith(MODULE):
        return f"factory {arch.removeprefix(MODULE)!r}"
    return f"architecture {arch!r}"
