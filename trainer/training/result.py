"""The result of a training, and the file that holds it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from migrator.trainer.data.items import Excluded
from migrator.trainer.encoders.manifest import Manifest, read_manifest
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.files import write_json

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class FitResult:
    """A finished training."""

    manifest: Manifest
    weights: Path
    history: list[dict[str, float]]
    """A row for each epoch: losses, lr, images_per_second, validation `self` and `cross`, and `p1` to choose by."""
    validation: dict[str, float]
    """mAP@100 of held-out queries: `self`; with an old encoder also `old` (both sides old), `cross`, `reverse`, and
    `procrustes`: the cross-test of the untrained backbone behind a rotation to the old space, the baseline to beat."""
    excluded: list[Excluded]
    best_epoch: int = 0
    """The epoch whose weights the encoder has; 0 for a post-hoc map."""


def write_result(
    out: Path, excluded: list[Excluded], history: list[dict[str, float]], measured: dict[str, float], best: int
) -> FitResult:
    """Writes `result.json` and removes the run's own image cache."""
    document = {
        "format": 1,
        "history": history,
        "validation": measured,
        "excluded": [asdict(entry) for entry in excluded],
        "best_epoch": best,
    }
    write_json(out / "result.json", document)
    # A cache of one's own is needed no more; one that was named is for others too.
    shutil.rmtree(out / "images", ignore_errors=True)
    result = read_result(out)
    assert result is not None
    return result


def read_result(out: Path) -> FitResult | None:
    """The result of a finished run; None before. Raises TrainingProblem where its encoder is gone."""
    if not (out / "result.json").exists():
        return None
    noted = json.loads((out / "result.json").read_text())
    weights = out / "encoder.safetensors"
    manifest = read_manifest(weights)
    if manifest is None or not weights.exists():
        raise TrainingProblem(f"{out} holds a finished run whose encoder is gone: put it back, or train with --restart")
    excluded = [Excluded(**entry) for entry in noted.get("excluded", noted.get("left_out", ()))]  # earlier runs
    return FitResult(manifest, weights, noted["history"], noted["validation"], excluded, noted["best_epoch"])
