"""Scanned digits as files, for tests of training, and the processes that train on them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits

from migrator.trainer.encoder import EncoderSpec, build_model, save_encoder


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


def trainers() -> ForkServerContext:
    """Starts processes from one that has torch already; importing it anew each time would take most of a test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["migrator.trainer.fit", "accelerate", "sklearn.datasets"])
    return context
