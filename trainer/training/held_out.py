"""Validation of a run on its held-out images, and the baseline to beat."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from migrator.trainer.files import write_json
from migrator.trainer.maps import apply_map, fit_map
from migrator.trainer.training import validation

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.training.inputs import Inputs
    from migrator.trainer.training.setup import Run


def validate(run: Run, *, reverse: bool = False) -> dict[str, float]:
    """`validation.measure` of the encoder as it is; empty where nothing is held out."""
    inputs = run.inputs
    if not len(inputs.queries):
        return {}
    new = _embed(run, inputs.queries, run.learner.encoder), _embed(run, inputs.gallery, run.learner.encoder)
    return validation.measure(new, held_out_old(inputs), held_out_labels(inputs), reverse=reverse)


def held_out_old(inputs: Inputs) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Old vectors (q, D) and (g, D) of held-out queries and gallery; None without an old encoder."""
    return None if inputs.old is None else (inputs.old[inputs.queries], inputs.old[inputs.gallery])


def held_out_labels(inputs: Inputs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels (q,) and (g,) of held-out queries and gallery."""
    return inputs.labels[inputs.queries], inputs.labels[inputs.gallery]


def _embed(run: Run, rows: NDArray[np.int64], model: nn.Module) -> NDArray[np.float32]:
    """Vectors of unit length from the encoder, or from its backbone alone."""
    learner, device = run.learner, run.accelerator.device
    learner.eval()
    vectors = []
    with torch.inference_mode():
        for part in np.array_split(rows, math.ceil(len(rows) / 256)):
            pixels = torch.from_numpy(run.inputs.pixels.take(part)).to(device)
            vectors.append(F.normalize(learner.embed(pixels, model)).cpu().numpy())
    return np.concatenate(vectors)


def measure_baseline(run: Run, out: Path) -> dict[str, float]:
    """`procrustes`: the cross-test of the backbone as it starts, behind the rotation that best meets the old vectors.

    What minutes of arithmetic give without training; a trained encoder has to beat it. Measured once a run.
    """
    inputs = run.inputs
    noted = out / "baseline.json"
    if noted.exists():
        kept: dict[str, float] = json.loads(noted.read_text())["validation"]
        return kept
    measured: dict[str, float] = {}
    if inputs.old is not None and len(inputs.queries):
        backbone = run.learner.encoder.backbone
        gallery = _embed(run, inputs.gallery, backbone)
        rotation = fit_map("procrustes", gallery, inputs.old[inputs.gallery], seed=run.settings.seed)
        queries = apply_map(rotation, _embed(run, inputs.queries, backbone))
        found = validation.mean_average_precision(queries, inputs.old[inputs.gallery], *held_out_labels(inputs))
        measured["procrustes"] = found
    write_json(noted, {"format": 1, "validation": measured})
    return measured
