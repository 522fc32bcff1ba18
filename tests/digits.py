"""Scanned digits as files, for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits

from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec


def digits_with_old_encoder(folder: Path, count: int, spec: EncoderSpec) -> None:
    """Writes images, items.csv, and old.safetensors, an encoder that is not trained: that does not matter there."""
    data = load_digits()
    lines = ["path,label"]
    for number, (image, label) in enumerate(zip(data.images[:count], data.target[:count], strict=True)):
        PIL.Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{label}")
    (folder / "items.csv").write_text("\n".join(lines))
    torch.manual_seed(0)
    save_encoder(build_model(spec), spec, folder / "old.safetensors")
