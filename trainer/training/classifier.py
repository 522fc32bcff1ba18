"""The classifier that a training leaves beside its encoder, for a later one that is trained with `bct`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F

from migrator.trainer.errors import TrainingProblem
from migrator.trainer.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.training.setup import Run


def save_classifier(run: Run, path: Path) -> None:
    """The directions of the classes, for a later encoder that is trained with `bct`."""
    from safetensors.torch import save

    head = getattr(run.learner.objective, "classification", None)
    if head is None or not run.settings.labelled:
        return
    weight = F.normalize(head.weight.detach().float().cpu())
    write_whole(path, save({"weight": weight}, metadata={"classes": json.dumps(run.inputs.class_names)}))


def read_classifier(path: Path, class_names: list[str], dim: int) -> NDArray[np.float32]:
    """The directions (C, D) that an old classifier has for these classes; NaN where it knows none.

    Raises TrainingProblem for a file that `fit` did not write or that is of another space.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            weight = file.get_tensor("weight")
            known = json.loads((file.metadata() or {})["classes"])
        rows = {name: row for row, name in enumerate(known)}
        usable = weight.ndim == 2 and len(weight) == len(rows) and bool(np.isfinite(weight).all())
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise TrainingProblem(
            f"old_classifier {path} cannot be read ({type(error).__name__}): name the classifier.safetensors that the "
            "old encoder's training left, or leave it out"
        ) from error
    if not usable or weight.shape[1] != dim:
        raise TrainingProblem(
            f"old_classifier {path} holds {weight.shape[-1]}-d directions, but the encoders give {dim}-d vectors: "
            "name the one that belongs to the old encoder, or leave it out"
        )
    found = np.full((len(class_names), dim), np.nan, np.float32)
    for row, name in enumerate(class_names):
        if name in rows:
            found[row] = weight[rows[name]]
    if np.isnan(found).all():
        raise TrainingProblem(f"old_classifier {path} knows none of the {len(class_names)} classes: leave it out")
    return found
