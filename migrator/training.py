"""`train`: from the configuration to a run of the trainer, recorded in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from migrator.config import StoreItems, Train
from migrator.errors import ConfigProblem, Refused
from migrator.planning import check_fresh
from migrator.project import Project
from migrator.verify.protocol import label_of
from trainer.errors import ImageProblem

if TYPE_CHECKING:
    from trainer.data import TrainingItems
    from trainer.fit import FitResult, FitSettings, Progress

PAGE = 5_000


def train(
    project: Project, *, resume: bool, restart: bool, report: Callable[[Progress], None] = lambda _: None
) -> FitResult:
    """Trains the new encoder of a planned migration; it becomes the migration's new encoder.

    `resume` goes on after a kill, `restart` throws an earlier run away. Raises `TrainingProblem` for data or
    settings that cannot be used, `TrainingFailed` if training diverged.
    """
    from trainer.fit import fit

    migration = project.migration()
    if migration.state != "planned":
        raise Refused(
            f"{project.name} is at stage {migration.stage} ({migration.state}): its new encoder cannot be exchanged; "
            f"plan a new migration, or `migrator rollback {project.name}` first"
        )
    config = project.settings.train
    if config is None or project.settings.new_encoder.weights is not None:
        raise ConfigProblem(
            f"{project.config.path}: migrations.{project.name}.new_encoder.weights are given, so there is nothing to "
            f"train: next is `migrator verify {project.name}`"
        )
    with project.store() as store:
        check_fresh(project, store)
    settings = _fit_settings(config)
    items = _items(project, config)
    old = project.old_encoder()
    folder = project.training_folder()
    run = project.ledger.start_training(
        migration.id, method=settings.method, settings=asdict(settings), folder=str(folder)
    )
    try:
        result = fit(
            items, project.images(), old, project.untrained_spec(), settings, folder,
            resume=resume, restart=restart, report=report,
        )  # fmt: skip
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        project.ledger.finish_training(run, encoder_id=None, validation=None, error=reason)
        raise
    project.ledger.save_encoder(result.card.id, result.card.to_json())
    project.ledger.finish_training(run, encoder_id=result.card.id, validation=result.validation, error=None)
    return result


def _fit_settings(config: Train) -> FitSettings:
    from trainer.fit import FitSettings

    given: dict[str, Any] = config.model_dump(exclude={"items"}, exclude_none=True)
    return FitSettings(**given)


def _items(project: Project, config: Train) -> TrainingItems:
    """The labelled images: from a file, or from the collection's own payloads."""
    from trainer.data import read_items, training_items

    if not isinstance(config.items, StoreItems):
        return read_items(config.items)
    images = project.images()
    paths: list[str] = []
    labels: list[str] = []
    with project.store() as store:
        after = None
        while ids := store.scan_ids(after=after, limit=PAGE):
            page = store.read(ids, vectors=False, payload=True)
            assert page.payloads is not None
            for item, payload in zip(page.ids, page.payloads, strict=True):
                try:
                    path = images.locate(item, payload)
                except ImageProblem:
                    continue  # an item without an image can be searched but not learnt from
                if label := label_of(config.items.label, item, payload):
                    paths.append(path)
                    labels.append(label)
            after = ids[-1]
    return training_items(paths, labels, source=f"collection of {project.name}")
