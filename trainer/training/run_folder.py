"""The folder of a training run: what it is bound to, its checkpoints, its result. Every file is whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from migrator.trainer.errors import TrainingProblem
from migrator.trainer.files import write_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_CHECKPOINT = re.compile(r"checkpoint-(\d{5})(?:-(\d{7}))?\.pt")
LOCK_WAIT = 2.0
"""Seconds. Listing the runs holds the lock for an instant, to see whether a process trains there."""
_RENAMED = {"most_left_out": "max_excluded"}
"""Settings by the last part of their names in earlier runs, which can still be resumed."""
_RUN_FILES = (
    "result.json", "encoder.json", "encoder.safetensors", "classifier.safetensors", "best.pt", "baseline.json",
    "inputs.json", "old_vectors.npy", "old_vectors_mirrored.npy", "shared.npz", "metrics.csv",
)  # fmt: skip


def _present_name(name: str) -> str:
    section, dot, key = name.rpartition(".")
    return f"{section}{dot}{_RENAMED.get(key, key)}"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it. Raises TrainingProblem for a folder that cannot be used."""
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=LOCK_WAIT):
            yield
    except Timeout:
        raise TrainingProblem(f"another process is training in {out}: wait for it or choose another folder") from None
    except ConnectionError:  # the reader of the progress reports is gone
        raise
    except OSError as error:
        raise TrainingProblem(
            f"run folder {out} cannot be written: {error.strerror or error}: make room or correct its permissions, "
            "then run the same command again"
        ) from error


def bind(out: Path, fingerprint: dict[str, Any], *, restart: bool) -> None:
    """Binds the folder to the run of this fingerprint, or checks that it is bound to it already.

    Raises TrainingProblem where the folder holds a run of another fingerprint that `restart` does not replace.
    """
    noted = out / "run.json"
    finished = (out / "result.json").exists()
    before = None
    if noted.exists():
        try:
            stored = json.loads(noted.read_text())["fingerprint"]
            before = {_present_name(name): value for name, value in stored.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            before = {}
    # Before the first checkpoint nothing is lost: a setting that was refused is corrected without --restart.
    if not restart and (finished or checkpoints(out)):
        if not before:
            raise TrainingProblem(f"{noted} is damaged or missing: start over with --restart")
        changed = [
            f"{name} was {before.get(name)} and is {fingerprint.get(name)}"
            for name in sorted({*before, *fingerprint})
            if before.get(name) != fingerprint.get(name)
        ]
        if changed:
            raise TrainingProblem(
                f"{out} holds {'a finished' if finished else 'an unfinished'} run with other inputs "
                f"({'; '.join(changed)}): change them back, train beside it with --run NAME, or replace it with "
                "--restart"
            )
    if restart or before != fingerprint:
        for path in [*checkpoints(out), *(out / name for name in _RUN_FILES)]:
            path.unlink(missing_ok=True)
        write_json(noted, {"format": 1, "fingerprint": fingerprint})


def check_can_finish(out: Path) -> None:
    """Raises TrainingProblem where no whole epoch has been trained, so that there is no best one."""
    state = load_checkpoint(out)
    if state is None or not state["history"]:
        raise TrainingProblem(f"{out} has no trained epoch yet: run train without --finish until one is complete")


def checkpoints(out: Path) -> list[Path]:
    """Oldest first. `checkpoint-00002.pt` is from the end of epoch 2, `checkpoint-00002-0000040.pt` 40 steps later."""
    found = {path: match for path in out.glob("checkpoint-*.pt") if (match := _CHECKPOINT.fullmatch(path.name))}
    return sorted(found, key=lambda path: (int(found[path][1]), int(found[path][2] or 0)))


def save_checkpoint(out: Path, state: dict[str, Any], *, epochs: int, step: int, keep: int) -> None:
    """Writes tensors and plain values after `epochs` whole epochs and `step` steps; only the last `keep` stay."""
    name = f"checkpoint-{epochs:05d}-{step:07d}.pt" if step else f"checkpoint-{epochs:05d}.pt"
    write_state(out / name, state)
    for path in checkpoints(out)[:-keep]:
        path.unlink()


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """The newest undamaged checkpoint's state."""
    for path in reversed(checkpoints(out)):
        state = read_state(path)
        if state is not None:
            return state
    return None


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values as a file of torch."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def read_state(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where the file is damaged or not there."""
    try:
        # torch does not verify the checksums in its own archives.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError):
        return None
    return state


def write_metrics(out: Path, history: Sequence[dict[str, float]]) -> None:
    """A row of `metrics.csv` for each epoch."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_whole(out / "metrics.csv", table.getvalue().encode())
