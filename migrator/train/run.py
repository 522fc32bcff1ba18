"""`migrator train`: from the configuration to a run of the trainer, recorded in the ledger."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from migrator.config import Train
from migrator.errors import ConfigError, PreconditionFailed
from migrator.lifecycle.freshness import check_fresh
from migrator.project import Project
from migrator.train.items import load_items
from migrator.training_runs import DEFAULT_RUN, run_with

if TYPE_CHECKING:
    from migrator.trainer.training.progress import Progress
    from migrator.trainer.training.result import FitResult
    from migrator.trainer.training.settings import FitSettings


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
    items, vectors, without_vector = load_items(project, config)
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
