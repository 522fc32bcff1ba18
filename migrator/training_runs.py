"""The training runs of a migration, side by side in the artifacts folder.

The run called `default` lies in `ARTIFACTS/NAME/training`, the others in `runs/RUN` below it. What is listed comes from
the files of a run, each of which is whole or not there; nothing is loaded but JSON and CSV.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from migrator.errors import UsageProblem

DEFAULT_RUN = "default"
MAX_EPOCHS = 10_000
"""Rows that are read of one training's table."""
_MAX_BYTES = 8 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_@.]{0,39}")

RunState = Literal["training", "interrupted", "finished"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One training run, as its folder shows it."""

    run: str
    folder: Path
    state: RunState
    method: str | None
    epochs: int
    """Whole epochs trained; 0 for a map."""
    epochs_planned: int | None
    best_epoch: int | None
    p1: float | None
    """P_1 of the best epoch, by which it was chosen; None without validation and for a map."""
    validation: dict[str, float]
    """mAP@100 of held-out queries: `self`, `cross`, `old`, ...; of the best epoch while the run is not finished."""
    encoder: str | None
    """Id of the encoder that the run has left."""

    def as_json(self) -> dict[str, Any]:
        """As `migrator runs --json` prints it."""
        return {
            "run": self.run,
            "folder": str(self.folder),
            "state": self.state,
            "method": self.method,
            "epochs": self.epochs,
            "epochs_planned": self.epochs_planned,
            "best_epoch": self.best_epoch,
            "p1": self.p1,
            "validation": self.validation,
            "encoder": self.encoder,
        }


def folder_of(training: Path, run: str) -> Path:
    """The folder of a run below the training folder. Raises `UsageProblem` for a name that is no folder's."""
    if run == DEFAULT_RUN:
        return training
    if not _NAME.fullmatch(run):
        raise UsageProblem(f"--run {run}: a run is named with letters, digits, dots, dashes and underscores, up to 64")
    return training / "runs" / run


def list_runs(training: Path) -> list[RunSummary]:
    """The runs below a training folder that have begun: the default run first, the others by name."""
    below = training / "runs"
    named = sorted(path.name for path in below.iterdir() if path.is_dir()) if below.is_dir() else []
    runs = [DEFAULT_RUN, *(name for name in named if _NAME.fullmatch(name) and name != DEFAULT_RUN)]
    folders = {run: folder_of(training, run) for run in runs}
    return [
        _summary(run, folder)
        for run, folder in folders.items()
        if (folder / "run.json").exists() or (folder / "encoder.safetensors").exists()
    ]


def encoder_of(folder: Path) -> str | None:
    """Id of the encoder that a run has left in its folder; None where there is none."""
    if not (folder / "encoder.safetensors").is_file():
        return None
    found = _read(folder / "encoder.json").get("id")
    return found if isinstance(found, str) else None


def is_cut_off(folder: Path) -> bool:
    """Whether the folder holds checkpoints of a run that has no result yet."""
    return any(folder.glob("checkpoint-*.pt")) and not (folder / "result.json").exists()


def run_with(training: Path, encoder_id: str | None) -> RunSummary | None:
    """The run that has left this encoder."""
    if encoder_id is None:
        return None
    return next((run for run in list_runs(training) if run.encoder == encoder_id), None)


def read_epochs(file: Path) -> list[dict[str, float]]:
    """The rows of a training's metrics.csv; none where there is no such file, as with a map, or it is no such table."""
    try:
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            return []
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows: list[dict[str, float]] = []
    for line in csv.DictReader(lines[: MAX_EPOCHS + 1]):
        row: dict[str, float] = {}
        for name, text in line.items():
            if not isinstance(text, str) or not _COLUMN.fullmatch(name or ""):
                continue
            try:
                row[name] = float(text)
            except ValueError:
                continue
        if "epoch" in row:
            rows.append(row)
    return rows


def _summary(run: str, folder: Path) -> RunSummary:
    from filelock import FileLock, Timeout

    fingerprint = _read(folder / "run.json").get("fingerprint") or {}
    result = _read(folder / "result.json")
    history = result.get("history") or read_epochs(folder / "metrics.csv")
    rated = [row for row in history if "p1" in row]
    best = max(rated, key=lambda row: (row["p1"], row["epoch"]), default=None)
    measured = {name: value for name, value in (best or {}).items() if name in ("self", "cross", "old")}
    state: RunState = "finished" if result else "interrupted"
    if not result and (folder / ".lock").exists():
        try:
            with FileLock(folder / ".lock", timeout=0):
                pass
        except Timeout:
            state = "training"
        except OSError:  # a folder that may only be read
            pass
    chosen = result.get("best_epoch") or (int(best["epoch"]) if best else None)
    return RunSummary(
        run=run,
        folder=folder,
        state=state,
        method=fingerprint.get("train.method"),
        epochs=len(history),
        epochs_planned=fingerprint.get("train.epochs"),
        best_epoch=chosen,
        p1=best["p1"] if best else None,
        validation=dict(result.get("validation") or measured),
        encoder=encoder_of(folder),
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where the file is missing or damaged."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
