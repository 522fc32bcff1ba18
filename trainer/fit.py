"""Trains a new encoder whose vectors can be compared with the old one's.

`fit` is the whole story: read the images once, train epoch by epoch, keep a checkpoint after each, save the encoder.
Its run folder holds `run.json` (what the run is bound to), `inputs.json` with `pixels.u8` and `old_vectors.npy`
(prepared once), `checkpoint-<epoch>.pt`, `metrics.csv`, and at the end `encoder.safetensors`, `encoder.json` and
`result.json`, in this order. Every file appears whole or not at all, so a killed run continues from what is there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.data import LeftOut, TrainingItems, augment, held_out_split, prepared_batches
from trainer.encoder import Card, EmbeddingNet, Encoder, EncoderSpec, build_model, read_card, save_encoder
from trainer.errors import TrainingFailed, TrainingProblem
from trainer.images import ImageSource
from trainer.losses import METHODS, LossSettings, build_objective
from trainer.old_space import measure_old_space

REPORT_EVERY = 20
"""Steps between two looks at the losses; each look waits for the device."""
METRIC_K = 100
QUERY_LIMIT, GALLERY_LIMIT = 2_000, 20_000
"""Most held-out queries and gallery images that validation after each epoch compares."""
GRADIENT_LIMIT = 5.0
"""Norm above which a step's gradient is scaled down."""


@dataclass(frozen=True, kw_only=True)
class FitSettings(LossSettings):
    """How to train. The defaults were chosen by measurement on small data, several seeds."""

    method: str = "advbct"
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.002
    weight_decay: float = 0.01
    seed: int = 0
    validation: float = 0.1
    """Share of the images held out; 0 for none."""
    most_left_out: float = 0.1
    """Share of the images that may be unreadable."""
    flip: bool = False
    """Mirror half of the images: right for products, wrong for digits."""
    bf16: bool = False
    """Run the encoder in bfloat16; losses stay in float32."""
    keep_checkpoints: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_workers: int = 4

    def __post_init__(self) -> None:
        shares = ("validation", "most_left_out", "radius_quantile")
        counts = ("epochs", "batch_size", "keep_checkpoints", "num_workers")
        positive = ("lr", "arcface_scale", "radius_limit")
        not_negative = ("weight_decay", "arcface_margin", "boundary_weight", "adversarial_weight", "seed")
        problems = [f"{n} must be from 0 to 1" for n in shares if not 0 <= getattr(self, n) <= 1]
        problems += [f"{n} must be at least 1" for n in counts if getattr(self, n) < 1]
        problems += [f"{n} must be above 0" for n in positive if not 0 < getattr(self, n) < math.inf]
        problems += [f"{n} must be 0 or more" for n in not_negative if not 0 <= getattr(self, n) < math.inf]
        if self.validation > 0.9:
            problems.append("validation must leave a tenth of the images to train on")
        if self.batch_size == 1:
            problems.append("batch_size must be at least 2")
        if self.method not in METHODS:
            problems.append(f"method must be one of {', '.join(METHODS)}")
        if problems:
            raise TrainingProblem("training settings: " + "; ".join(problems))

    def resolved(self) -> FitSettings:
        """Itself, or with the numbers of the published recipe where `reference` asks for it."""
        if not self.reference:
            return self
        return replace(
            self,
            lr=0.1,
            weight_decay=5e-4,
            boundary_weight=1.0,
            adversarial_weight=1.0,
            radius_quantile=1.0,
            radius_limit=1.0,
        )


@dataclass(frozen=True)
class Progress:
    """Where training stands: images read (stage `images`), or steps of an epoch done (stage `train`)."""

    stage: Literal["images", "train"]
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

    card: Card
    weights: Path
    history: list[dict[str, float]]
    """A row for each epoch: losses, lr, images_per_second, validation `self` and `cross`."""
    validation: dict[str, float]
    """mAP@100 of held-out queries: `self`; with an old encoder also `old` (both sides old), `cross`, `reverse`."""
    left_out: list[LeftOut]


@dataclass(frozen=True)
class Inputs:
    """What training reads, in rows of usable images."""

    pixels: NDArray[np.uint8]  # (n, 3, S, S)
    labels: NDArray[np.int64]  # (n,)
    old: NDArray[np.float32] | None  # (n, D) unit length
    left_out: list[LeftOut]
    train: NDArray[np.int64]  # rows
    queries: NDArray[np.int64]  # rows held out
    gallery: NDArray[np.int64]  # rows of `train`


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
            value = torch.tensor(getattr(spec.preprocessing, name), dtype=torch.float32) * 255
            self.register_buffer(name, value[:, None, None], persistent=False)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, not normalised."""
        images = (pixels - self.mean) / self.std
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            features: Tensor = self.encoder(images)
        return features.float()

    def forward(
        self, pixels: Tensor, labels: Tensor, old: Tensor | None, progress: float, remaining: float
    ) -> dict[str, Tensor]:
        """The weighted loss terms by name, scalars."""
        terms: dict[str, Tensor] = self.objective(
            self.embed(pixels), labels, old, progress=progress, remaining=remaining
        )
        return terms


def fit(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | None,
    spec: EncoderSpec,
    settings: FitSettings,
    out: Path,
    *,
    resume: bool = False,
    restart: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> FitResult:
    """Trains an encoder of `spec` on the labelled images, compatible with `old` if the method is, in run folder `out`.

    `resume` continues a run that was cut off, at the end of its last good epoch, and gives what the uninterrupted run
    would have given (on the CPU, bit for bit); of a finished run it returns the result; where there is no run it starts
    one. `restart` throws away what an earlier run left in `out`.
    Raises TrainingProblem for unusable input or a run folder of another run, TrainingFailed when the loss diverges,
    ImagesUnavailable and EncoderProblem as the image source and the encoder do.
    """
    settings = settings.resolved()
    if old is not None and old.dim != spec.dim:
        raise TrainingProblem(
            f"old encoder {old.id} gives {old.dim}-d vectors but the new encoder {spec.dim}-d: "
            f"set new_encoder.dim to {old.dim}"
        )
    if spec.weights is not None:
        raise TrainingProblem(
            f"new_encoder.weights names {spec.weights}, but training makes new weights: remove it "
            "(pretrained: true starts from timm's)"
        )
    with _lock(out), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        fingerprint = _fingerprint(items, old, spec, settings)
        _open_run(out, fingerprint, resume=resume, restart=restart)
        finished = _read_result(out)
        if finished is not None:
            return finished
        inputs = load_inputs(items, images, old, spec, settings, out, report)
        run = setup(inputs, spec, settings, classes=len(items.classes))
        history = _load_checkpoint(out, run)
        for epoch in range(len(history) + 1, settings.epochs + 1):
            history.append(train_epoch(run, epoch, out, report))
            _save_checkpoint(out, run, history)
        return save(out, run, history)


# --- inputs ---------------------------------------------------------------------------------------------------------


def load_inputs(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | None,
    spec: EncoderSpec,
    settings: FitSettings,
    out: Path,
    report: Callable[[Progress], None],
) -> Inputs:
    """Images and old vectors, from the run folder where they are already, else read, prepared and encoded once."""
    if not (out / "inputs.json").exists():
        _gather_inputs(items, images, old, spec, settings, out, report)
    noted = json.loads((out / "inputs.json").read_text())
    rows = noted["rows"]
    side = spec.preprocessing.image_size
    classes = {label: number for number, label in enumerate(items.classes)}
    labels = np.array([classes[items.labels[row]] for row in rows], np.int64)
    if len(np.unique(labels)) < 2:
        raise TrainingProblem(f"the {len(rows)} readable training images are all of one class: add another")
    train, held_out = held_out_split(labels, settings.validation, seed=settings.seed)
    if len(train) < settings.batch_size:
        raise TrainingProblem(
            f"{len(train)} images are left to train on ({len(held_out)} held out, {len(items) - len(rows)} left out), "
            f"fewer than a batch of {settings.batch_size}: add images or set train.batch_size to {len(train)} or less"
        )
    random = np.random.default_rng(settings.seed)
    return Inputs(
        pixels=np.memmap(out / "pixels.u8", np.uint8, "r", shape=(len(rows), 3, side, side)),
        labels=labels,
        old=np.load(out / "old_vectors.npy") if old is not None else None,
        left_out=[LeftOut(**entry) for entry in noted["left_out"]],
        train=train,
        queries=np.sort(random.permutation(held_out)[:QUERY_LIMIT]),
        gallery=np.sort(random.permutation(train)[:GALLERY_LIMIT]),
    )


def _gather_inputs(
    items: TrainingItems,
    images: ImageSource,
    old: Encoder | None,
    spec: EncoderSpec,
    settings: FitSettings,
    out: Path,
    report: Callable[[Progress], None],
) -> None:
    prepares = [spec.preprocessing.prepare]
    if old is not None:
        prepares.append(old.prepare)
    rows: list[int] = []
    left_out: list[LeftOut] = []
    old_vectors: list[NDArray[np.float32]] = []
    started = time.monotonic()
    with (out / "pixels.u8").open("wb") as pixels:
        for batch in prepared_batches(items.paths, images, prepares, workers=settings.num_workers):
            rows += batch.rows
            left_out += batch.left_out
            if batch.rows:
                pixels.write(batch.arrays[0].tobytes())
                if old is not None:
                    old_vectors.append(old.encode(batch.arrays[1]))
            done = len(rows) + len(left_out)
            rate = done / (time.monotonic() - started)
            report(Progress("images", 0, settings.epochs, done, len(items), images_per_second=rate))
        pixels.flush()
        os.fsync(pixels.fileno())
    if len(left_out) > settings.most_left_out * len(items) or not rows:
        raise TrainingProblem(
            f"{len(left_out)} of {len(items)} training images cannot be used (first: {left_out[0].reason}): "
            f"repair or remove them; up to {settings.most_left_out:.0%} may be left out"
        )
    if old is not None:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(old_vectors))
        _write(out / "old_vectors.npy", buffer.getvalue())
    _write_json(out / "inputs.json", {"format": 1, "rows": rows, "left_out": [asdict(entry) for entry in left_out]})


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


def setup(inputs: Inputs, spec: EncoderSpec, settings: FitSettings, *, classes: int) -> Run:
    """A fresh model, its losses and its optimiser, on the device."""
    accelerator = _accelerator(settings)
    torch.manual_seed(settings.seed)
    old_space = None
    if inputs.old is not None:
        rows = inputs.train
        old_space = measure_old_space(
            inputs.old[rows], inputs.labels[rows], classes=classes, quantile=settings.radius_quantile
        )
    objective = build_objective(settings.method, settings, dim=spec.dim, classes=classes, old=old_space)
    learner = Learner(build_model(spec), objective, spec, bf16=settings.bf16)
    # Weight decay would pull norms, biases and the radii's w_c towards a value that means something else than "small".
    decayed = [p for p in learner.parameters() if p.ndim >= 2]
    others = [p for p in learner.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.reference:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    return Run(inputs, spec, settings, accelerator, learner, wrapped, optimizer)


def _accelerator(settings: FitSettings) -> Any:
    from accelerate import Accelerator

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise TrainingProblem("device is cuda but this machine offers none: set train.device to auto or cpu")
    try:
        return Accelerator(cpu=settings.device == "cpu", mixed_precision="no")
    except ValueError as error:
        # accelerate fixes the device once for a process.
        raise TrainingProblem(f"device {settings.device} cannot be used in this process: {error}") from error


def learning_rate(settings: FitSettings, progress: float) -> float:
    """At `progress` (0..1) of the run: a short warm-up, then a half cosine to 0; steps for the published recipe."""
    if settings.reference:
        return settings.lr * 0.1 ** sum(progress >= mark for mark in (5 / 30, 10 / 30, 20 / 30))
    warm_up = min(1.0, (progress + 0.01) / 0.1)
    return settings.lr * warm_up * 0.5 * (1 + math.cos(math.pi * progress))


def train_epoch(run: Run, epoch: int, out: Path, report: Callable[[Progress], None]) -> dict[str, float]:
    """One pass over the training images, then validation. Returns the epoch's row of `metrics.csv`.

    Raises TrainingFailed when a loss or a weight is no longer finite.
    """
    settings, inputs, accelerator = run.settings, run.inputs, run.accelerator
    # Each epoch has a seed of its own: a resumed run draws what the uninterrupted one drew, with no state to keep.
    seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed + accelerator.process_index)
    order = inputs.train[torch.randperm(len(inputs.train), generator=generator).numpy()]
    order = order[accelerator.process_index :: accelerator.num_processes]
    size = settings.batch_size
    steps = len(order) // size
    run.wrapped.train()
    total: dict[str, float] = {}
    pending: list[dict[str, Tensor]] = []
    started = time.monotonic()
    for step in range(steps):
        progress = (epoch - 1 + step / steps) / settings.epochs
        rate = learning_rate(settings, progress)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        rows = order[step * size : (step + 1) * size]
        pixels, labels, old = _batch(run, rows)
        pixels = augment(pixels, flip=settings.flip, generator=generator)
        remaining = (settings.epochs - epoch + 1) / settings.epochs
        terms = run.wrapped(pixels, labels, old, progress, remaining)
        run.optimizer.zero_grad()
        accelerator.backward(torch.stack(list(terms.values())).sum())
        accelerator.clip_grad_norm_(run.wrapped.parameters(), GRADIENT_LIMIT)
        run.optimizer.step()
        pending.append({name: term.detach() for name, term in terms.items()})
        if len(pending) == REPORT_EVERY or step == steps - 1:
            table = torch.stack([torch.stack(list(row.values())) for row in pending]).cpu().numpy()
            if not np.isfinite(table).all():
                bad = int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])
                raise _diverged(out, epoch, step + 1 - len(pending) + bad + 1)
            for name, column in zip(terms, table.T, strict=True):
                total[name] = total.get(name, 0.0) + float(column.sum())
            losses = {name: total[name] / (step + 1) for name in total}
            speed = (step + 1) * size * accelerator.num_processes / (time.monotonic() - started)
            pending.clear()
            if step < steps - 1:
                report(Progress("train", epoch, settings.epochs, step + 1, steps, losses, speed))
    # A finite loss in the last step does not promise finite weights after it.
    if not torch.stack([p.detach().isfinite().all() for p in run.learner.parameters()]).all():
        raise _diverged(out, epoch, steps)
    validation = validate(run)
    report(Progress("train", epoch, settings.epochs, steps, steps, losses, speed, validation))
    return {"epoch": epoch, **losses, "lr": rate, "images_per_second": speed, **validation}


def _batch(run: Run, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor | None]:
    device = run.accelerator.device
    old = run.inputs.old
    return (
        torch.from_numpy(run.inputs.pixels[rows]).to(device),
        torch.from_numpy(run.inputs.labels[rows]).to(device),
        None if old is None else torch.from_numpy(old[rows]).to(device),
    )


def _diverged(out: Path, epoch: int, step: int) -> TrainingFailed:
    kept = _checkpoints(out)
    good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    return TrainingFailed(
        f"the loss is not finite at step {step} of epoch {epoch} ({good}): lower train.lr and train with --restart"
    )


# --- validation -----------------------------------------------------------------------------------------------------


def validate(run: Run, *, reverse: bool = False) -> dict[str, float]:
    """mAP@100 of held-out queries in a gallery of training images: `self`, and with old vectors `cross` and `old`.

    Empty where nothing is held out. With `reverse` also old queries in the new gallery.
    """
    inputs = run.inputs
    if not len(inputs.queries):
        return {}
    labels = (inputs.labels[inputs.queries], inputs.labels[inputs.gallery])
    new_queries, new_gallery = _encode(run, inputs.queries), _encode(run, inputs.gallery)
    measured = {"self": mean_average_precision(new_queries, new_gallery, *labels)}
    if inputs.old is not None:
        old_queries, old_gallery = inputs.old[inputs.queries], inputs.old[inputs.gallery]
        measured["cross"] = mean_average_precision(new_queries, old_gallery, *labels)
        measured["old"] = mean_average_precision(old_queries, old_gallery, *labels)
        if reverse:
            measured["reverse"] = mean_average_precision(old_queries, new_gallery, *labels)
    return measured


def _encode(run: Run, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    run.learner.eval()
    with torch.inference_mode():
        batches = [
            F.normalize(run.learner.embed(torch.from_numpy(run.inputs.pixels[part]).to(run.accelerator.device)))
            for part in np.array_split(rows, math.ceil(len(rows) / 256))
        ]
        vectors: NDArray[np.float32] = torch.cat(batches).cpu().numpy()
    return vectors


def mean_average_precision(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    gallery_labels: NDArray[np.int64],
    k: int = METRIC_K,
) -> float:
    """mAP@k by inner product: the mean over queries of sum_i precision@i relevant_i / min(k, number of relevant items).

    queries (q, D), gallery (g, D). Queries without a relevant item are left out; 0 where no query has one.
    """
    relevant_items = np.bincount(gallery_labels, minlength=int(query_labels.max()) + 1)[query_labels]
    k = min(k, len(gallery))
    precisions = []
    for start in range(0, len(queries), 256):
        part = slice(start, start + 256)
        order = np.argsort(-(queries[part] @ gallery.T), axis=1, kind="stable")[:, :k]
        relevant = gallery_labels[order] == query_labels[part, None]
        precision = relevant.cumsum(axis=1) / np.arange(1, k + 1)
        precisions.append((precision * relevant).sum(axis=1) / np.clip(relevant_items[part], 1, k))
    answerable = relevant_items > 0
    return float(np.concatenate(precisions)[answerable].mean()) if answerable.any() else 0.0


# --- the run folder -------------------------------------------------------------------------------------------------


def save(out: Path, run: Run, history: list[dict[str, float]]) -> FitResult:
    """Writes the trained encoder and the result, and gives back the disk space of the prepared images."""
    validation = validate(run, reverse=True)
    save_encoder(run.learner.encoder, run.spec, out / "encoder.safetensors")
    left_out = [asdict(entry) for entry in run.inputs.left_out]
    _write_json(out / "result.json", {"format": 1, "history": history, "validation": validation, "left_out": left_out})
    result = _read_result(out)
    assert result is not None
    return result


def _read_result(out: Path) -> FitResult | None:
    if not (out / "result.json").exists():
        return None
    (out / "pixels.u8").unlink(missing_ok=True)
    noted = json.loads((out / "result.json").read_text())
    weights = out / "encoder.safetensors"
    card = read_card(weights)
    if card is None or not weights.exists():
        raise TrainingProblem(f"{out} holds a finished run whose encoder is gone: put it back, or train with --restart")
    left_out = [LeftOut(**entry) for entry in noted["left_out"]]
    return FitResult(card, weights, noted["history"], noted["validation"], left_out)


def _fingerprint(items: TrainingItems, old: Encoder | None, spec: EncoderSpec, settings: FitSettings) -> dict[str, Any]:
    """What decides the outcome of a run, flat, named as in messages."""
    settings_of_outcome = asdict(settings)
    for name in ("device", "num_workers", "keep_checkpoints"):
        del settings_of_outcome[name]
    new = asdict(spec)
    new.update(new.pop("preprocessing"))
    values = {
        **{f"train.{name}": value for name, value in settings_of_outcome.items()},
        **{f"new_encoder.{name}": value for name, value in new.items()},
        "old encoder": old.id if old is not None else None,
        "training items": items.digest[:16],
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _open_run(out: Path, fingerprint: dict[str, Any], *, resume: bool, restart: bool) -> None:
    """Binds the folder to this run, or checks that it is bound to it already."""
    noted = out / "run.json"
    finished = (out / "result.json").exists()
    before = None
    if noted.exists():
        try:
            before = json.loads(noted.read_text())["fingerprint"]
        except (ValueError, KeyError, TypeError):
            before = {}
    # Before the first checkpoint nothing is lost: who corrects a setting that was refused need not say restart.
    if not restart and (finished or _checkpoints(out)):
        if not resume:
            state = "a finished" if finished else "an unfinished"
            raise TrainingProblem(f"{out} holds {state} run: continue with --resume, or replace it with --restart")
        if not before:
            raise TrainingProblem(f"{noted} is damaged or missing: start over with --restart")
        changed = [
            f"{name} was {before.get(name)} and is {fingerprint.get(name)}"
            for name in sorted({*before, *fingerprint})
            if before.get(name) != fingerprint.get(name)
        ]
        if changed:
            raise TrainingProblem(
                f"{out} holds a run with other inputs ({'; '.join(changed)}): put them back or use --restart"
            )
    if restart or before != fingerprint:
        ours = ("result.json", "encoder.json", "encoder.safetensors", "inputs.json", "pixels.u8", "old_vectors.npy")
        for path in [*_checkpoints(out), *(out / name for name in ours), out / "metrics.csv"]:
            path.unlink(missing_ok=True)
        _write_json(noted, {"format": 1, "fingerprint": fingerprint})


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise TrainingProblem(f"another process is training in {out}: wait for it or choose another folder") from None
    except OSError as error:
        raise TrainingProblem(f"run folder {out} cannot be written: {error.strerror or error}") from error


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted(out.glob("checkpoint-*.pt"))


def _save_checkpoint(out: Path, run: Run, history: list[dict[str, float]]) -> None:
    buffer = io.BytesIO()
    state = {"learner": run.learner.state_dict(), "optimizer": run.optimizer.state_dict(), "history": history}
    torch.save(state, buffer)
    _write(out / f"checkpoint-{len(history):05d}.pt", buffer.getvalue())
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write(out / "metrics.csv", table.getvalue().encode())
    for path in _checkpoints(out)[: -run.settings.keep_checkpoints]:
        path.unlink()


def _load_checkpoint(out: Path, run: Run) -> list[dict[str, float]]:
    """Puts the run where its newest undamaged checkpoint left it and returns the history so far."""
    for path in reversed(_checkpoints(out)):
        state = _read_checkpoint(path)
        if state is not None:
            run.learner.load_state_dict(state["learner"])
            run.optimizer.load_state_dict(state["optimizer"])
            return list(state["history"])
    return []


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where the file is damaged."""
    try:
        # torch does not look at the checksums in its own archives.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError):
        return None
    return state


def _write_json(path: Path, document: dict[str, Any]) -> None:
    _write(path, json.dumps(document, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Durably, and whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
