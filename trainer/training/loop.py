"""The training loop: epochs, steps, checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from migrator.trainer.data.augment import augmented, draw_views
from migrator.trainer.data.batches import batches_ahead, epoch_rows
from migrator.trainer.errors import TrainingFailed, TrainingInterrupted
from migrator.trainer.training import run_folder, validation
from migrator.trainer.training.held_out import validate
from migrator.trainer.training.progress import Progress

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from migrator.trainer.training.settings import FitSettings
    from migrator.trainer.training.setup import Run

REPORT_EVERY = 20
"""Steps between two reports of the losses; each report waits for the device."""
GRADIENT_LIMIT = 5.0
"""Norm above which a step's gradient is scaled down."""


@dataclass
class Epoch:
    """How far an epoch has come: what a checkpoint within it must know beside the state of the run."""

    number: int
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the losses over the steps."""


def learning_rate(settings: FitSettings, progress: float) -> float:
    """At `progress` (0..1) of the run: a short warm-up, then a half cosine to 0; steps for the published recipe."""
    if settings.reference:
        return settings.lr * 0.1 ** sum(progress >= mark for mark in (5 / 30, 10 / 30, 20 / 30))
    warm_up = min(1.0, (progress + 0.01) / 0.1)
    return settings.lr * warm_up * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    run: Run, out: Path, report: Callable[[Progress], None], stop: threading.Event | None
) -> list[dict[str, float]]:
    """From the newest checkpoint, or the start, to the end. Returns the row of each epoch.

    Raises TrainingFailed when a loss or a weight is no longer finite, TrainingInterrupted after `stop` was set.
    """
    settings = run.settings
    if settings.trackers:
        config = {name: value for name, value in settings.plain().items() if isinstance(value, int | float | str)}
        run.accelerator.init_trackers("migrator", config=config)
    history, epoch = resume(run, out)
    while epoch.number <= settings.epochs:
        if stop is not None and stop.is_set():
            raise _interrupted(run, epoch)
        row = train_epoch(run, epoch, history, out, report, stop)
        history.append(row)
        if run.accelerator.is_main_process:
            if "p1" in row and row["p1"] >= max(r["p1"] for r in history):
                run_folder.write_state(out / "best.pt", {"epoch": epoch.number, "encoder": _weights(run)})
            run_folder.write_metrics(out, history)
            _checkpoint(run, out, history, None)
        epoch = Epoch(epoch.number + 1)
    run.accelerator.wait_for_everyone()
    if settings.trackers:
        run.accelerator.end_training()
    return history


def _interrupted(run: Run, epoch: Epoch) -> TrainingInterrupted:
    return TrainingInterrupted(f"training stopped in epoch {epoch.number} of {run.settings.epochs}, after a checkpoint")


def train_epoch(
    run: Run,
    epoch: Epoch,
    history: list[dict[str, float]],
    out: Path,
    report: Callable[[Progress], None],
    stop: threading.Event | None,
) -> dict[str, float]:
    """What is left of one pass over the training images, then validation. Returns the epoch's row of `metrics.csv`."""
    settings, inputs, handle = run.settings, run.inputs, run.accelerator
    generator = torch.Generator().manual_seed(_seed(settings, epoch.number, 0))
    order = epoch_rows(inputs.train, inputs.labels, balanced=settings.class_balanced, generator=generator)
    steps = len(order) // settings.batch_size
    first = epoch.step
    saved = started = time.monotonic()
    pending: list[dict[str, Tensor]] = []
    losses: dict[str, float] = {}
    speed = rate = 0.0
    run.wrapped.train()
    for batch in batches_ahead(lambda n: _batch(run, order, epoch.number, first + n), steps - first):
        progress = (epoch.number - 1 + epoch.step / steps) / settings.epochs
        rate = learning_rate(settings, progress)
        pending.append(train_step(run, batch, epoch.number, epoch.step, rate=rate, progress=progress))
        epoch.step += 1
        stopped = stop is not None and stop.is_set()
        due = handle.is_main_process and (stopped or time.monotonic() - saved > 60 * settings.checkpoint_minutes)
        if len(pending) < REPORT_EVERY and epoch.step < steps and not due:
            continue
        _add_up(epoch, pending, out)
        losses = {name: total / epoch.step for name, total in epoch.totals.items()}
        speed = (epoch.step - first) * settings.batch_size / (time.monotonic() - started)
        pending.clear()
        if settings.trackers:
            done = (epoch.number - 1) * steps + epoch.step
            handle.log({**losses, "lr": rate, "images_per_second": speed}, step=done)
        if epoch.step < steps:
            report(Progress("train", epoch.number, settings.epochs, epoch.step, steps, losses, speed))
            if due:
                _require_finite(run, epoch, out)
                _checkpoint(run, out, history, epoch)
                saved = time.monotonic()
            if stopped:
                raise _interrupted(run, epoch)
    # A finite loss in the last step does not promise finite weights after it.
    _require_finite(run, epoch, out)
    measured = validate(run) if handle.is_main_process else {}
    if measured:
        measured["p1"] = validation.score(measured, settings.upper_bound)
    if settings.trackers and measured:
        handle.log(measured, step=epoch.number * steps)
    report(Progress("train", epoch.number, settings.epochs, steps, steps, losses, speed, measured))
    return {"epoch": epoch.number, **losses, "lr": rate, "images_per_second": speed, **measured}


def train_step(
    run: Run,
    batch: list[tuple[Tensor, Tensor, Tensor | None]],
    epoch: int,
    step: int,
    *,
    rate: float,
    progress: float,
) -> dict[str, Tensor]:
    """One step of the optimiser on a batch in micro-batches. Returns the loss terms, without waiting for the device."""
    settings, handle, device = run.settings, run.accelerator, run.accelerator.device
    # Every step has a seed of its own: a resumed run draws what the uninterrupted one drew, with no state to keep.
    torch.manual_seed(_seed(settings, epoch, step + 1) + handle.process_index)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    remaining = (settings.epochs - epoch + 1) / settings.epochs
    run.optimizer.zero_grad()
    found: dict[str, Tensor] = {}
    for number, (pixels, labels, old) in enumerate(batch, start=1):
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        old = None if old is None else old.to(device, non_blocking=True)
        with handle.no_sync(run.wrapped) if number < len(batch) else contextlib.nullcontext():
            terms = run.wrapped(pixels, labels, old, progress, remaining)
            handle.backward(torch.stack(list(terms.values())).sum() / len(batch))
        for name, term in terms.items():
            found[name] = found.get(name, 0) + term.detach() / len(batch)
    handle.clip_grad_norm_(run.wrapped.parameters(), GRADIENT_LIMIT)
    run.optimizer.step()
    return found


def _seed(settings: FitSettings, epoch: int, step: int) -> int:
    return int(np.random.SeedSequence([settings.seed, epoch, step]).generate_state(1)[0])


def _batch(run: Run, order: NDArray[np.int64], epoch: int, step: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """This process's part of each micro-batch of a step. What is drawn at random is drawn for the whole batch."""
    settings, inputs, handle = run.settings, run.inputs, run.accelerator
    size = settings.batch_size
    rows = order[step * size : (step + 1) * size]
    generator = torch.Generator().manual_seed(_seed(settings, epoch, step + 1))
    views = draw_views(size, run.spec.preprocessing.size, flip=settings.flip, generator=generator)
    micro = size // settings.accumulate
    part = micro // handle.num_processes
    found = []
    for start in range(handle.process_index * part, size, micro):
        own = slice(start, start + part)
        seen = views.part(own)
        pixels = augmented(torch.from_numpy(inputs.pixels.take(rows[own])), seen)
        old = None
        if inputs.old is not None:
            vectors = inputs.old[rows[own]]
            if inputs.old_flipped is not None:
                vectors = np.where(seen.mirrored.numpy()[:, None], inputs.old_flipped[rows[own]], vectors)
            old = torch.from_numpy(vectors)
        labels = torch.from_numpy(inputs.labels[rows[own]])
        if handle.device.type == "cuda":
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
            old = old.pin_memory() if old is not None else None
        found.append((pixels, labels, old))
    return found


def _add_up(epoch: Epoch, pending: list[dict[str, Tensor]], out: Path) -> None:
    """Adds the losses of the last steps to the epoch's. Raises TrainingFailed for one that is not finite."""
    table = torch.stack([torch.stack(list(row.values())) for row in pending]).cpu().numpy()
    if not np.isfinite(table).all():
        bad = int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])
        raise _diverged(out, epoch.number, epoch.step - len(pending) + bad + 1)
    for name, column in zip(pending[0], table.T, strict=True):
        total = epoch.totals.get(name, 0.0)
        for value in column:  # one by one: the sum must not depend on where a checkpoint cut the steps
            total += float(value)
        epoch.totals[name] = total


def _require_finite(run: Run, epoch: Epoch, out: Path) -> None:
    if not torch.stack([p.detach().isfinite().all() for p in run.learner.parameters()]).all():
        raise _diverged(out, epoch.number, epoch.step)


def _diverged(out: Path, epoch: int, step: int) -> TrainingFailed:
    kept = run_folder.checkpoints(out)
    good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    return TrainingFailed(
        f"the loss is not finite at step {step} of epoch {epoch} ({good}): lower train.lr and train with --restart"
    )


def _checkpoint(run: Run, out: Path, history: list[dict[str, float]], epoch: Epoch | None) -> None:
    """At the end of an epoch, or within one."""
    state = {"learner": run.learner.state_dict(), "optimizer": run.optimizer.state_dict(), "history": history}
    if epoch is not None:
        state |= {"step": epoch.step, "totals": epoch.totals}
    step = epoch.step if epoch is not None else 0
    run_folder.save_checkpoint(out, state, epochs=len(history), step=step, keep=run.settings.keep_checkpoints)


def resume(run: Run, out: Path) -> tuple[list[dict[str, float]], Epoch]:
    """Puts the run where its newest undamaged checkpoint left it. Returns the epochs done and the one that is next."""
    state = run_folder.load_checkpoint(out)
    if state is None:
        return [], Epoch(1)
    run.learner.load_state_dict(state["learner"])
    run.optimizer.load_state_dict(state["optimizer"])
    history = list(state["history"])
    return history, Epoch(len(history) + 1, state.get("step", 0), dict(state.get("totals", {})))


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in run.learner.encoder.state_dict().items()}
