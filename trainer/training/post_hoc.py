"""Learning a map from the vectors of an existing encoder to the old ones, in place of training an encoder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from migrator.trainer.encoders.loading import load_base
from migrator.trainer.encoders.saving import save_mapped_encoder
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.maps import apply_map, fit_map
from migrator.trainer.training import validation
from migrator.trainer.training.held_out import held_out_labels, held_out_old
from migrator.trainer.training.inputs import Inputs, load_inputs
from migrator.trainer.training.progress import Progress
from migrator.trainer.training.result import FitResult, write_result

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.data.items import TrainingItems
    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.source import ImageSource
    from migrator.trainer.old_space import StoredVectors
    from migrator.trainer.training.settings import FitSettings


def fit_post_hoc(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | StoredVectors | None,
    spec: EncoderSpec,
    settings: FitSettings,
    out: Path,
    report: Callable[[Progress], None],
) -> FitResult:
    """Learns a map from the vectors of an encoder that is there to the old ones, instead of an encoder."""
    if spec.weights is None and not spec.pretrained and not spec.arch.startswith("module:"):
        raise TrainingProblem(
            f"method {settings.method} maps the vectors of an encoder that exists: give new_encoder.weights, a module, "
            "or pretrained: true"
        )
    base = load_base(spec, device=settings.device)
    inputs = load_inputs(items, images, old, spec.preprocessing, settings, out, report)
    assert inputs.old is not None
    vectors = _base_vectors(base, inputs, report)
    maps = {
        kind: fit_map(kind, vectors[inputs.train], inputs.old[inputs.train], seed=settings.seed)
        for kind in dict.fromkeys(("procrustes", settings.method))
    }
    measured: dict[str, float] = {}
    if len(inputs.queries):
        for kind, fitted in maps.items():
            new = apply_map(fitted, vectors[inputs.queries]), apply_map(fitted, vectors[inputs.gallery])
            found = validation.measure(new, held_out_old(inputs), held_out_labels(inputs), reverse=True)
            if kind == settings.method:
                measured |= found
            if kind == "procrustes":
                measured["procrustes"] = found["cross"]
    save_mapped_encoder(base, spec, maps[settings.method], spec.dim, out / "encoder.safetensors")
    return write_result(out, inputs.excluded, [], measured, 0)


def _base_vectors(base: Encoder, inputs: Inputs, report: Callable[[Progress], None]) -> NDArray[np.float32]:
    """Unit vectors (n, d) of all images by the encoder that is to be mapped."""
    count = len(inputs.pixels)
    vectors = np.empty((count, base.dim), np.float32)
    started = time.monotonic()
    for start in range(0, count, 256):
        rows = np.arange(start, min(start + 256, count))
        vectors[rows] = base.encode(inputs.pixels.take(rows))
        done = int(rows[-1]) + 1
        rate = done / max(time.monotonic() - started, 1e-9)
        report(Progress("train", 1, 1, done, count, images_per_second=rate))
    return vectors
