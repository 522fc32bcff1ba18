"""Trains a new encoder whose vectors can be compared with the old one's.

`fit` is the whole story: prepare images and old vectors once, measure the baseline, train epoch by epoch with
checkpoints, save the encoder of the best epoch. Its run folder holds `run.json` (what the run is bound to), the inputs,
`baseline.json`, `checkpoint-*.pt`, `best.pt`, `metrics.csv`, and at the end `encoder.safetensors`, `encoder.json` and
`result.json`, in this order. Every file appears whole or not at all, so a killed run continues from what is there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from migrator.trainer.data.shards import pixel_key
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.errors import TrainingProblem
from migrator.trainer.images.transforms import open_transform
from migrator.trainer.maps import POST_HOC
from migrator.trainer.methods.registry import METHODS, old_is_missing
from migrator.trainer.old_space import StoredVectors
from migrator.trainer.training import run_folder
from migrator.trainer.training.classifier import save_classifier
from migrator.trainer.training.distributed import accelerator, broadcast, receive
from migrator.trainer.training.held_out import measure_baseline, validate
from migrator.trainer.training.inputs import load_inputs
from migrator.trainer.training.loop import resume, train
from migrator.trainer.training.post_hoc import fit_post_hoc
from migrator.trainer.training.result import FitResult, read_result, write_result
from migrator.trainer.training.settings import FitSettings, RunSettings
from migrator.trainer.training.setup import Run, setup
from migrator.trainer.training.shared_inputs import share, shared

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from migrator.trainer.data.items import TrainingItems
    from migrator.trainer.encoders.encoder import Encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.source import ImageSource
    from migrator.trainer.training.progress import Progress


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
    report: Callable[[Progress], None] = lambda _: None,
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
            finished = read_result(out)
            if finish and finished is None:
                run_folder.check_can_finish(out)
            if finished is None and settings.method in POST_HOC:
                finished = fit_post_hoc(items, images, old, spec, settings, out, report)
            if finished is not None:
                broadcast(handle, "leave")
                return finished
            inputs = load_inputs(items, images, old, spec.preprocessing, settings, out, report)
            if handle.num_processes > 1:
                share(inputs, out, settings)
        except BaseException:
            broadcast(handle, "leave")
            raise
        broadcast(handle, "train")
        run = setup(inputs, spec, settings, handle)
        baseline = measure_baseline(run, out)
        history = resume(run, out)[0] if finish else train(run, out, report, stop)
        return _save(out, run, history, baseline)


def follow(spec: EncoderSpec, settings: FitSettings, out: Path) -> None:
    """Trains along with the first of several processes, which calls `fit` with the same `spec`, `settings` and `out`.

    All else comes from the run folder, which every process must see.
    """
    settings = settings.resolved()
    handle = accelerator(settings.device)
    if receive(handle) == "train":
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            inputs, labelled = shared(out, spec, settings)
            settings = replace(settings, labelled=labelled)
            train(setup(inputs, spec, settings, handle), out, lambda _: None, None)


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


def _save(out: Path, run: Run, history: list[dict[str, float]], baseline: dict[str, float]) -> FitResult:
    """Writes the encoder of the best epoch (the latest, without validation), its classifier and the result."""
    best = len(history)
    if "p1" in history[-1]:
        best = max(range(len(history)), key=lambda n: (history[n]["p1"], n)) + 1
        # Also where that is the last whole epoch: the checkpoint may be from within the next one.
        state = run_folder.read_state(out / "best.pt")
        if state is not None and state["epoch"] > len(history):
            # Killed between the two files of an epoch, then called with --finish.
            raise TrainingProblem(f"{out}: epoch {state['epoch']} is not complete: run train without --finish first")
        if state is None or state["epoch"] != best:
            raise TrainingProblem(f"{out / 'best.pt'} is damaged or missing: train again with --restart")
        run.learner.encoder.load_state_dict(state["encoder"])
    measured = {**validate(run, reverse=True), **baseline}
    save_encoder(run.learner.encoder, run.spec, out / "encoder.safetensors")
    save_classifier(run, out / "classifier.safetensors")
    return write_result(out, run.inputs.excluded, history, measured, best)


def _fingerprint(
    items: TrainingItems, old: Encoder | StoredVectors | None, spec: EncoderSpec, settings: FitSettings
) -> dict[str, Any]:
    """What decides the outcome of a run, flat, named as in messages."""
    settings_of_outcome = settings.plain()
    for field in fields(RunSettings):
        del settings_of_outcome[field.name]
    new = asdict(spec)
    del new["preprocessing"]
    new.update(spec.preprocessing.declared())
    if spec.preprocessing.transform is not None:  # the code behind its name may have changed
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
