"""Trains a new encoder whose vectors can be compared with the old one's.

`fit` is the whole story: prepare images and old vectors once, measure the baseline, train epoch by epoch with
checkpoints, save the encoder of the best epoch. Its run folder holds `run.json` (what the run is bound to), the inputs,
`baseline.json`, `checkpoint-*.pt`, `best.pt`, `metrics.csv`, and at the end `encoder.safetensors`, `encoder.json` and
`result.json`, in this order. Every file appears whole or not at all, so a killed run continues from what is there.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from migrator.trainer.data.augment import augmented, draw_views
from migrator.trainer.data.batches import batches_ahead, epoch_rows
from migrator.trainer.data.cache import open_pixels, pixel_key
from migrator.trainer.data.items import Excluded, TrainingItems
from migrator.trainer.encoders.encoder import (
    EmbeddingNet,
    Encoder,
    EncoderSpec,
    Manifest,
    build_model,
    load_base,
    read_manifest,
    save_encoder,
    save_mapped_encoder,
)
from migrator.trainer.errors import TrainingFailed, TrainingInterrupted, TrainingProblem
from migrator.trainer.files import write_json, write_whole
from migrator.trainer.images.source import ImageSource
from migrator.trainer.images.transforms import open_transform
from migrator.trainer.maps import POST_HOC, Map, fit_map
from migrator.trainer.methods.registry import METHODS, build_objective, old_is_missing
from migrator.trainer.old_space import StoredVectors, measure_old_space
from migrator.trainer.training import run_folder, validation
from migrator.trainer.training.distributed import accelerator, gathered, share_batch_statistics
from migrator.trainer.training.inputs import Inputs, load_inputs
from migrator.trainer.training.settings import FitSettings

__all__ = ["FitResult", "FitSettings", "Progress", "fit", "follow"]

REPORT_EVERY = 20
"""Steps between two reports of the losses; each report waits for the device."""
GRADIENT_LIMIT = 5.0
"""Norm above which a step's gradient is scaled down."""
NEUTRAL = (
    "device", "image_threads", "keep_checkpoints", "checkpoint_minutes", "trackers", "cache", "cache_gib", "compile",
)  # fmt: skip
"""Settings that do not decide the outcome, beyond the last bits: they may change when a run is resumed."""


@dataclass(frozen=True)
class Progress:
    """Where training stands: images and old vectors prepared, or steps of an epoch done (stage `train`)."""

    stage: Literal["images", "old vectors", "train"]
    epoch: int
    epochs: int
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    validation: Mapping[str, float] = field(default_factory=dict)
    """mAP@100 by name, with the last report of an epoch."""


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


class Learner(nn.Module):
    """Encoder and losses in one module, so that one wrapper serves several devices and one state dict is saved."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: EmbeddingNet, objective: nn.Module, spec: EncoderSpec, *, bf16: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.bf16 = bf16
        for name in ("mean", "std"):
            value = torch.tensor(getattr(spec.preprocessing, name), dtype=torch.float32) * spec.preprocessing.levels
            self.register_buffer(name, value[:, None, None], persistent=False)

    def embed(self, pixels: Tensor, model: nn.Module | None = None) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, not normalised, by the encoder or by `model`, a part of it."""
        images = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            features: Tensor = (model or self.encoder)(images)
        return features.float()

    def forward(
        self, pixels: Tensor, labels: Tensor, old: Tensor | None, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The weighted loss terms by name, scalars; each over the batch of all processes."""
        features = gathered(self.embed(pixels))
        if old is not None:
            old = gathered(old)
        terms: dict[str, Tensor] = self.objective(
            features, gathered(labels), old, progress=progress, remaining=remaining
        )
        return terms


def fit(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | StoredVectors | None,
    spec: EncoderSpec,
    settings: FitSettings,
    out: Path,
    *,
    restart: bool = False,
    finish: bool = False,
    stop: threading.Event | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> FitResult:
    """Trains an encoder of `spec` on the images, compatible with `old` if the method is, in run folder `out`.

    Of the methods in `migrator.trainer.maps.POST_HOC` nothing is trained but a map from the vectors of `spec`, whose
    weights are there already, to the old space.

    A run that was cut off continues at its last good checkpoint and gives what the uninterrupted run would have given
    (on the CPU, bit for bit); of a finished run the result is returned; where there is no run one starts. `restart`
    throws away what an earlier run left in `out`. `finish` trains no further: the best epoch of a run that was cut off
    becomes its encoder. Once `stop` is set, a checkpoint is written after the step and TrainingInterrupted is raised.
    In a run of several processes this is for the first one, without `finish` and `stop`; the others call `follow`.
    Raises TrainingProblem for unusable input or a run folder of another run, TrainingFailed when the loss diverges,
    ImagesUnavailable and EncoderProblem as the image source and the encoder do.
    """
    settings = _settled(items, settings)
    _check(items, old, spec, settings)
    if spec.preprocessing.transform is not None:
        open_transform(spec.preprocessing.transform, spec.folder)
    handle = accelerator(settings.device, trackers=settings.trackers, folder=out)
    with run_folder.locked(out), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            run_folder.bind(out, _fingerprint(items, old, spec, settings), restart=restart)
            finished = _read_result(out)
            if finish and finished is None:
                run_folder.check_can_finish(out)
            if finished is None and settings.method in POST_HOC:
                finished = _fit_map(items, images, old, spec, settings, out, report)
            if finished is not None:
                _broadcast(handle, "leave")
                return finished
            inputs = _inputs(items, images, old, spec, settings, out, report)
            if handle.num_processes > 1:
                share(inputs, out, settings)
        except BaseException:
            _broadcast(handle, "leave")
            raise
        _broadcast(handle, "train")
        run = setup(inputs, spec, settings, handle)
        baseline = _baseline(run, out)
        history = _resume(run, out)[0] if finish else train(run, out, report, stop)
        return _save(out, run, history, baseline)


def follow(spec: EncoderSpec, settings: FitSettings, out: Path) -> None:
    """Trains along with the first of several processes, which calls `fit` with the same `spec`, `settings` and `out`.

    All else comes from the run folder, which every process must see.
    """
    settings = settings.resolved()
    handle = accelerator(settings.device)
    if _received(handle) == "train":
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            inputs, labelled = shared(out, spec, settings)
            settings = replace(settings, labelled=labelled)
            train(setup(inputs, spec, settings, handle), out, lambda progress: None, None)


def _settled(items: TrainingItems, settings: FitSettings) -> FitSettings:
    labelled = items.labels is not None or settings.pseudo_classes is not None
    return replace(settings.resolved(), labelled=labelled)


def _check(items: TrainingItems, old: Encoder | StoredVectors | None, spec: EncoderSpec, settings: FitSettings) -> None:
    method = settings.method
    trained = METHODS.get(method)  # None: a map, which needs old vectors and no labels
    needs_labels = trained is not None and trained.needs_labels
    needs_old = trained is None or trained.needs_old
    if needs_old and old is None:
        raise old_is_missing(method)
    if needs_labels and items.labels is None:
        if settings.pseudo_classes is None:
            why = f" ({items.unlabelled})" if items.unlabelled else ""
            raise TrainingProblem(
                f"method {method} needs labels and the items have none{why}: give labels, set train.pseudo_classes to "
                "a number of classes to find among the old vectors, or set train.method to hot_refresh"
            )
        if old is None:
            raise TrainingProblem("pseudo_classes are found among old vectors: declare old_encoder, or give labels")
    if isinstance(old, StoredVectors) and len(old.vectors) != len(items):
        raise TrainingProblem(
            f"{len(items)} training images but {len(old.vectors)} stored vectors: give one for each image, in order"
        )
    if needs_old and old is not None and old.dim != spec.dim:
        raise TrainingProblem(
            f"old encoder {old.id} gives {old.dim}-d vectors but the new encoder {spec.dim}-d: "
            f"set new_encoder.dim to {old.dim}, or train.method to independent and rollout.strategy to shadow"
        )
    if spec.weights is not None and method not in POST_HOC:
        raise TrainingProblem(
            f"new_encoder.weights names {spec.weights}, but training makes new weights: remove it "
            "(pretrained: true starts from timm's)"
        )


# --- inputs ---------------------------------------------------------------------------------------------------------


def _inputs(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | StoredVectors | None,
    spec: EncoderSpec,
    settings: FitSettings,
    out: Path,
    report: Callable[[Progress], None],
) -> Inputs:
    def report_inputs(stage: Literal["images", "old vectors"], done: int, of: int, images_per_second: float) -> None:
        report(Progress(stage, 0, settings.epochs, done, of, images_per_second=images_per_second))

    return load_inputs(
        items,
        images,
        old,
        spec.preprocessing,
        out,
        validation=settings.validation,
        seed=settings.seed,
        batch_size=settings.batch_size,
        flip=settings.flip,
        image_threads=settings.image_threads,
        max_excluded=settings.max_excluded,
        pseudo_classes=settings.pseudo_classes,
        cache=settings.cache,
        cache_gib=settings.cache_gib,
        report=report_inputs,
    )


# --- training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that training works on. Its state is `learner` and `optimizer`, nothing else."""

    inputs: Inputs
    spec: EncoderSpec
    settings: FitSettings
    accelerator: Any
    learner: Learner
    wrapped: nn.Module
    optimizer: Any


@dataclass
class Epoch:
    """How far an epoch has come: what a checkpoint within it must know beside the state of the run."""

    number: int
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the losses over the steps."""


def setup(inputs: Inputs, spec: EncoderSpec, settings: FitSettings, handle: Any) -> Run:
    """A fresh model, its losses and its optimiser, on the device.

    Raises TrainingProblem where the batch cannot be shared among processes and micro-batches.
    """
    parts = handle.num_processes * settings.accumulate
    if settings.batch_size % parts or settings.batch_size // parts < 2:
        raise TrainingProblem(
            f"a batch of {settings.batch_size} cannot be shared by {handle.num_processes} processes x "
            f"{settings.accumulate} micro-batches: set train.batch_size to a multiple of {parts}, at least {2 * parts}"
        )
    torch.manual_seed(settings.seed)
    old_space = None
    if METHODS[settings.method].needs_old and inputs.old is not None:
        rows = inputs.train
        old_space = measure_old_space(
            inputs.old[rows],
            inputs.labels[rows],
            classes=inputs.classes,
            quantile=settings.radius_quantile,
            shrink=not settings.reference,
        )
        if settings.old_classifier is not None:
            old_space = replace(
                old_space, classifier=read_classifier(settings.old_classifier, inputs.class_names, spec.dim)
            )
    objective = build_objective(settings.method, settings, dim=spec.dim, classes=inputs.classes, old=old_space)
    encoder = build_model(spec)
    encoder = share_batch_statistics(encoder, handle.device)  # type: ignore[assignment]
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(encoder, objective, spec, bf16=settings.bf16)
    # Weight decay would pull norms, biases and the radii's w_c towards a value that means something else than "small".
    # The published recipe decays everything.
    decayed = [p for p in learner.parameters() if p.ndim >= 2 or settings.reference]
    others = [p for p in learner.parameters() if p.ndim < 2 and not settings.reference]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.reference:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    if settings.compile:
        learner.encoder.compile()
    wrapped, optimizer = handle.prepare(learner, optimizer)
    return Run(inputs, spec, settings, handle, learner, wrapped, optimizer)


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
    history, epoch = _resume(run, out)
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


def _resume(run: Run, out: Path) -> tuple[list[dict[str, float]], Epoch]:
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


# --- validation -----------------------------------------------------------------------------------------------------


def validate(run: Run, *, reverse: bool = False) -> dict[str, float]:
    """`validation.measure` of the encoder as it is; empty where nothing is held out."""
    inputs = run.inputs
    if not len(inputs.queries):
        return {}
    new = _embed(run, inputs.queries, run.learner.encoder), _embed(run, inputs.gallery, run.learner.encoder)
    return validation.measure(new, _old_sides(inputs), _labels(inputs), reverse=reverse)


def _old_sides(inputs: Inputs) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    return None if inputs.old is None else (inputs.old[inputs.queries], inputs.old[inputs.gallery])


def _labels(inputs: Inputs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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


def _baseline(run: Run, out: Path) -> dict[str, float]:
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
        queries = _mapped(rotation, _embed(run, inputs.queries, backbone))
        found = validation.mean_average_precision(queries, inputs.old[inputs.gallery], *_labels(inputs))
        measured["procrustes"] = found
    write_json(noted, {"format": 1, "validation": measured})
    return measured


# --- the end --------------------------------------------------------------------------------------------------------


def _save(out: Path, run: Run, history: list[dict[str, float]], baseline: dict[str, float]) -> FitResult:
    """Writes the encoder of the best epoch (the latest, without validation), its classifier and the result."""
    best = len(history)
    if "p1" in history[-1]:
        best = max(range(len(history)), key=lambda n: (history[n]["p1"], n)) + 1
        # Also where that is the last whole epoch: the checkpoint may be from within the next one.
        state = run_folder.read_state(out / "best.pt")
        if state is not None and state["epoch"] > len(history):
            # Killed between the two files of an epoch, and asked to finish.
            raise TrainingProblem(f"{out}: epoch {state['epoch']} is not complete: run train without --finish first")
        if state is None or state["epoch"] != best:
            raise TrainingProblem(f"{out / 'best.pt'} is damaged or missing: train again with --restart")
        run.learner.encoder.load_state_dict(state["encoder"])
    measured = {**validate(run, reverse=True), **baseline}
    save_encoder(run.learner.encoder, run.spec, out / "encoder.safetensors")
    _save_classifier(run, out / "classifier.safetensors")
    return _write_result(out, run.inputs.excluded, history, measured, best)


def _save_classifier(run: Run, path: Path) -> None:
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


def _write_result(
    out: Path, excluded: list[Excluded], history: list[dict[str, float]], measured: dict[str, float], best: int
) -> FitResult:
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
    result = _read_result(out)
    assert result is not None
    return result


def _read_result(out: Path) -> FitResult | None:
    if not (out / "result.json").exists():
        return None
    noted = json.loads((out / "result.json").read_text())
    weights = out / "encoder.safetensors"
    manifest = read_manifest(weights)
    if manifest is None or not weights.exists():
        raise TrainingProblem(f"{out} holds a finished run whose encoder is gone: put it back, or train with --restart")
    excluded = [Excluded(**entry) for entry in noted.get("excluded", noted.get("left_out", ()))]  # earlier runs
    return FitResult(manifest, weights, noted["history"], noted["validation"], excluded, noted["best_epoch"])


def _fingerprint(
    items: TrainingItems, old: Encoder | StoredVectors | None, spec: EncoderSpec, settings: FitSettings
) -> dict[str, Any]:
    """What decides the outcome of a run, flat, named as in messages."""
    settings_of_outcome = settings.plain()
    for name in NEUTRAL:
        del settings_of_outcome[name]
    new = asdict(spec)
    del new["preprocessing"]
    new.update(spec.preprocessing.declared())
    if spec.preprocessing.transform is not None:  # its name does not tell what it does today
        new["transform's output"] = pixel_key(spec.preprocessing)
    del new["folder"]
    for key in ("head", "checkpoint_key"):
        if new[key] is None:  # runs from before these keys existed can be resumed
            del new[key]
    values = {
        **{f"train.{name}": value for name, value in settings_of_outcome.items()},
        **{f"new_encoder.{name}": value for name, value in new.items()},
        "old encoder": old.id if old is not None else None,
        "training items": items.digest[:16],
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


# --- post-hoc maps --------------------------------------------------------------------------------------------------


def _fit_map(
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
    inputs = _inputs(items, images, old, spec, settings, out, report)
    assert inputs.old is not None
    vectors = _base_vectors(base, inputs, report)
    maps = {
        kind: fit_map(kind, vectors[inputs.train], inputs.old[inputs.train], seed=settings.seed)
        for kind in dict.fromkeys(("procrustes", settings.method))
    }
    measured: dict[str, float] = {}
    if len(inputs.queries):
        for kind, fitted in maps.items():
            new = _mapped(fitted, vectors[inputs.queries]), _mapped(fitted, vectors[inputs.gallery])
            found = validation.measure(new, _old_sides(inputs), _labels(inputs), reverse=True)
            if kind == settings.method:
                measured |= found
            if kind == "procrustes":
                measured["procrustes"] = found["cross"]
    save_mapped_encoder(base, spec, maps[settings.method], spec.dim, out / "encoder.safetensors")
    return _write_result(out, inputs.excluded, [], measured, 0)


def _mapped(fitted: Map, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (n, d) of unit length -> (n, D) of unit length."""
    with torch.inference_mode():
        mapped: NDArray[np.float32] = F.normalize(fitted(torch.tensor(vectors))).numpy()
    return mapped


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


# --- several processes ----------------------------------------------------------------------------------------------


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


def _broadcast(handle: Any, what: Literal["train", "leave"]) -> None:
    """Lets the other processes continue, once all that they need lies in the run folder."""
    if handle.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list([what])


def _received(handle: Any) -> str:
    from accelerate.utils import broadcast_object_list

    message = ["leave"]
    if handle.num_processes > 1:
        broadcast_object_list(message)
    return message[0]
