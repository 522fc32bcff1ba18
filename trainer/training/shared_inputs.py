"""The same inputs for all processes of a training, by way of the run folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from migrator.trainer.data.pixels import open_pixels
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.training.inputs import Inputs

if TYPE_CHECKING:
    from pathlib import Path

    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.training.settings import FitSettings


def share(inputs: Inputs, out: Path, settings: FitSettings) -> None:
    """Leaves in the run folder what the other processes need to read the same inputs."""
    if inputs.old is not None and not (out / "old_vectors.npy").exists():
        np.save(out / "old_vectors.npy", inputs.old)
    digests = np.frombuffer(b"".join(inputs.digests), np.uint8).reshape(-1, 32)
    arrays = {name: getattr(inputs, name) for name in ("labels", "train", "queries", "gallery")}
    names = np.array(json.dumps(inputs.class_names))
    np.savez(out / "shared.npz", digests=digests, names=names, labelled=settings.labelled, **arrays)


def shared(out: Path, spec: EncoderSpec, settings: FitSettings) -> tuple[Inputs, bool]:
    """What `share` left, and whether the labels are real. Raises TrainingProblem where the cache has lost images."""
    with np.load(out / "shared.npz") as file:
        noted = dict(file)
    digests = [row.tobytes() for row in noted["digests"]]
    cache = settings.cache or out / "images"
    pixels = open_pixels(cache, spec.preprocessing, digests)
    if pixels is None:
        raise TrainingProblem(f"the image cache {cache} is not the one that the first process filled: share it")
    old = [
        np.load(out / name, mmap_mode="r") if (out / name).exists() else None
        for name in ("old_vectors.npy", "old_vectors_mirrored.npy")
    ]
    names = json.loads(str(noted["names"]))
    inputs = Inputs(
        pixels=pixels,
        digests=digests,
        labels=noted["labels"],
        classes=len(names),
        class_names=names,
        old=old[0],
        old_flipped=old[1],
        excluded=[],
        train=noted["train"],
        queries=noted["queries"],
        gallery=noted["gallery"],
    )
    return inputs, bool(noted["labelled"])
