"""`train`: from the configuration to a run of the trainer, recorded in the ledger."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.iterate import iter_ids, payloads
from migrator.config import ItemsFrom, Train
from migrator.embedding.stored_vectors import old_vectors
from migrator.errors import ConfigError, PreconditionFailed
from migrator.labels import training_label
from migrator.lifecycle.freshness import check_fresh
from migrator.project import Project
from migrator.trainer.errors import ImageProblem
from migrator.trainer.images.templates import MAX_FIELDS, field_advice, fields_of
from migrator.training_runs import DEFAULT_RUN, run_with

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from migrator.trainer.data.items import Excluded, TrainingItems
    from migrator.trainer.training.progress import Progress
    from migrator.trainer.training.result import FitResult
    from migrator.trainer.training.settings import FitSettings

log = logging.getLogger(__name__)


def train(
    project: Project,
    *,
    method: str | None = None,
    run: str = DEFAULT_RUN,
    restart: bool = False,
    finish: bool = False,
    stop: threading.Event | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> FitResult | None:
    """Trains the new encoder of a planned migration; it becomes the candidate unless that is of another run.

    `method` stands in for `train.method`. A run that was cut off is continued; `restart` throws it away, `finish` takes
    the encoder of its best epoch, `stop` cuts it off after a checkpoint.
    Under `torchrun` or `accelerate launch` every process calls this: the first one reads, writes and gives the result,
    the others train along and give None.
    Raises `TrainingProblem` for data or settings that cannot be used, `TrainingFailed` if training diverged.
    """
    from migrator.trainer.maps import POST_HOC
    from migrator.trainer.old_space import stored_vectors
    from migrator.trainer.training.distributed import is_first_process
    from migrator.trainer.training.fit import fit, follow

    config = project.settings.train
    chosen = method or (config.method if config else None)
    if config is None or not project.trains(method):
        raise ConfigError(
            f"{project.config.path}: migrations.{project.name}.new_encoder.weights are given, so there is nothing to "
            f"train: next is `migrator verify {project.name}` (a train section with method procrustes, ridge or "
            "residual_mlp maps their vectors to the old ones)"
        )
    settings = _fit_settings(project, config, chosen)
    spec = project.base_spec() if chosen in POST_HOC else project.untrained_spec()
    folder = project.training_folder(run)
    if not is_first_process():
        if chosen not in POST_HOC:
            follow(spec, settings, folder)
        return None
    migration = project.migration()
    if migration.state != "planned":
        raise PreconditionFailed(
            f"{project.name} is at stage {migration.stage} ({migration.state}): its new encoder cannot be exchanged; "
            f"plan a new migration, or `migrator rollback {project.name}` first"
        )
    with project.store() as store:
        check_fresh(project, store)
        if project.old_is_stored:  # an old model is loaded below
            project.check_old_encoder(store)
    items, vectors, without_vector = _items(project, config)
    old = project.old_encoder() if vectors is None else stored_vectors(vectors)
    training = project.ledger.start_training(
        migration.id,
        method=settings.method,
        settings=settings.plain(),
        folder=str(folder),
    )
    try:
        result = fit(
            items, project.images(), old, spec, settings, folder,
            restart=restart, finish=finish, stop=stop, report=report,
        )  # fmt: skip
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        project.ledger.finish_training(training, encoder_id=None, validation=None, error=reason)
        raise
    project.ledger.save_encoder(result.manifest.id, result.manifest.to_json())
    other = run_with(project.training_folder(), project.migration().new_encoder_id)
    project.ledger.finish_training(
        training,
        encoder_id=result.manifest.id,
        validation=result.validation,
        error=None,
        is_candidate=other is None or other.run == run,
    )
    return replace(result, excluded=[*without_vector, *result.excluded])


def _fit_settings(project: Project, config: Train, method: str | None) -> FitSettings:
    from migrator.trainer.training.settings import FitSettings

    given: dict[str, Any] = config.model_dump(exclude={"items"}, exclude_none=True)
    given.setdefault("cache", project.training_folder().parent.parent / "images")  # shared by all runs
    return FitSettings(**{**given, "method": method, "trackers": tuple(config.trackers)})


def _items(project: Project, config: Train) -> tuple[TrainingItems, NDArray[np.float32] | None, list[Excluded]]:
    """The images to learn from; where there is no old model, with the stored vector of each, (n, dim) of unit length.

    Images without such a vector are excluded and named. Raises `PreconditionFailed` where none has one.
    """
    from migrator.trainer.data.folders import folder_items
    from migrator.trainer.data.items import Excluded, read_items, training_items

    if not isinstance(config.items, ItemsFrom):
        items = read_items(config.items, project.images(), need_labels=False)
    elif config.items.source == "folders":
        items = folder_items(Path(project.settings.images.root.removeprefix("file://")))
        _warn_skipped(items)
    else:
        items = _items_of_store(project, config.items.label)
    if not project.old_is_stored:
        return items, None, []
    with project.store() as store:
        vectors = old_vectors(store, project.images(), items.paths)
        collection = store.describe().name
    known = vectors.any(axis=1)
    if not known.any():
        raise PreconditionFailed(
            f"old_encoder is stored, and none of the {len(items)} training images, for instance {items.paths[0]!r}, is "
            f"an item of {collection}: list paths as images.uri makes them, or set train.items to {{from: store}}"
        )
    rows = np.flatnonzero(known).tolist()
    labels = None if items.labels is None else [items.labels[row] for row in rows]
    kept = training_items([items.paths[row] for row in rows], labels, source="train.items, as far as stored,")
    excluded = [
        Excluded(items.paths[row], "no item of the collection with a usable vector has this image")
        for row in np.flatnonzero(~known).tolist()
    ]
    return kept, vectors[known], excluded


def _warn_skipped(items: TrainingItems) -> None:
    """What an image folder holds besides its training images."""
    if items.skipped:
        total = sum(one.count for one in items.skipped)
        log.warning("%d images in folders; skipped %d: %s", len(items), total, "; ".join(map(str, items.skipped)))


def _items_of_store(project: Project, label: str | None) -> TrainingItems:
    """The collection's own images, with labels from the payloads; items without one are skipped.

    Raises `ConfigError` where no item has a label, or a label is a list or a structure.
    """
    from migrator.trainer.data.items import training_items

    images = project.images()
    key = f"{project.config.path}: migrations.{project.name}.train.items.label"
    paths: list[str] = []
    labels: list[str] = []
    fields: dict[str, None] = {}
    with project.store() as store:
        for item, payload in payloads(store, iter_ids(store)):
            try:
                path = images.locate(item, payload)
            except ImageProblem:
                continue  # an item without an image can be searched but not learnt from
            if label is None:
                paths.append(path)
                continue
            text = training_label(project, label, item, payload)
            if text:
                paths.append(path)
                labels.append(text)
            elif len(fields) < MAX_FIELDS:
                fields |= dict.fromkeys(fields_of(payload))
    if not paths and label is not None:
        raise ConfigError(f"{key}: no item with an image has a value for {label!r}: {field_advice(label, fields)}")
    items = training_items(paths, None if label is None else labels, source=f"collection of {project.name}")
    return items if label is not None else replace(items, unlabelled="train.items.label is not set")
