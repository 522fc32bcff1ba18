"""`migrator train`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from migrator.cli.common import (
    confirm,
    json_option,
    migration_options,
    open_project,
    print_json,
    print_table,
    progress,
    say,
    stop_on_signal,
    yes_option,
)
from migrator.config import Method
from migrator.errors import UsageProblem
from migrator.training_runs import DEFAULT_RUN, is_cut_off

if TYPE_CHECKING:
    from migrator.trainer.training.progress import Progress

METHODS = get_args(Method)
TESTS = {
    "old": "old, old",
    "cross": "new, old",
    "self": "new, new",
    "reverse": "old, new",
    "procrustes": "new rotated without training, old",
}
"""The tests on held-out images, in the order of the table."""


@click.command("train")
@migration_options
@click.option("--method", type=click.Choice(METHODS), help="In place of train.method of the configuration.")
@click.option("--run", default=DEFAULT_RUN, show_default=True, help="The run's name: each has its own folder.")
@click.option("--restart", is_flag=True, help="Throw the earlier run of this name away and start over.")
@click.option("--finish", is_flag=True, help="Train no further: take the best epoch of a run that was interrupted.")
@click.option("--resume", is_flag=True, hidden=True, help="No longer needed: a run that was cut off is continued.")
@json_option
@yes_option
def command(
    name: str | None,
    config_path: Path,
    method: str | None,
    run: str,
    restart: bool,
    finish: bool,
    resume: bool,
    as_json: bool,
    yes: bool,
) -> None:
    """Train the new encoder to be comparable with the old one.

    Leaves checkpoints, metrics.csv and encoder.safetensors in the artifacts folder. The first Ctrl-C or SIGTERM writes
    a checkpoint and leaves with exit code 130, a second one leaves at once; the same command continues the run. On
    several GPUs or machines it is started by `torchrun ... -m migrator train` or `accelerate launch -m migrator train`.
    """
    from migrator.train.run import train
    from migrator.trainer.errors import TrainingInterrupted
    from migrator.trainer.training.distributed import is_distributed, is_first_process

    if restart and (finish or resume):
        raise UsageProblem(f"--restart and --{'finish' if finish else 'resume'} exclude each other")
    if finish and is_distributed():
        raise UsageProblem("--finish trains nothing: run it without torchrun or accelerate launch")
    with open_project(config_path, name) as project:
        if is_first_process():
            settings = project.settings.train
            chosen = method or (settings.method if settings else None)
            how = f"train {project.settings.new_encoder.named}" + (f" with {chosen}" if chosen else "")
            folder = project.training_folder(run)
            if finish:
                confirm(f"take the encoder of the best epoch so far in {folder}", yes=yes)
            else:
                again = ", throwing away an earlier run," if restart else ""
                again = ", continuing the run that was cut off," if is_cut_off(folder) and not restart else again
                confirm(f"{how}{again} in {folder}", yes=yes)
        # A launcher stops its processes together, and those that train along could not be stopped in time.
        stopping = nullcontext() if is_distributed() else stop_on_signal("step")
        is_done = (project.training_folder(run) / "result.json").exists() and not restart
        with stopping as stop, progress("training") as advance:

            def report(state: Progress) -> None:
                if stop is not None and stop.is_set() and state.stage != "train":
                    raise TrainingInterrupted("interrupted before the first step; images prepared so far are kept")
                if state.stage != "train":
                    advance(state.step, state.steps, f"{state.stage}, {state.images_per_second:.0f} images/s")
                    return
                losses = " ".join(f"{key} {value:.3f}" for key, value in state.losses.items())
                step = (state.epoch - 1) * state.steps + state.step
                text = f"epoch {state.epoch}/{state.epochs} {state.images_per_second:.0f} images/s {losses}"
                advance(step, state.epochs * state.steps, text)
                if state.validation:
                    found = ", ".join(f"{key} {value:.3f}" for key, value in state.validation.items())
                    say(f"epoch {state.epoch}/{state.epochs}: {losses}; {found}", err=True)

            try:
                result = train(
                    project, method=method, run=run, restart=restart, finish=finish, stop=stop, report=report
                )
            except TrainingInterrupted as interrupted:
                raise TrainingInterrupted(
                    f"{interrupted}: the same command continues; with --finish it takes the best epoch so far"
                ) from None
        if result is None:  # a process that trained along
            return
        if as_json:
            print_json(
                {
                    "run": run,
                    "encoder": result.manifest.id,
                    "weights": str(result.weights),
                    "validation": result.validation,
                }
            )
            return
        print_table(
            ("held-out images", "queries, gallery", "mAP@100"),
            [
                (test, sides, f"{result.validation[test]:.4f}")
                for test, sides in TESTS.items()
                if test in result.validation
            ],
        )
        if result.excluded:
            first = result.excluded[0]
            say(f"{len(result.excluded)} images were excluded, for instance {first.path}: {first.reason}")
        if is_done:
            say("trained already: --restart trains it again, --run NAME another one beside it")
        if result.best_epoch:
            say(f"weights of epoch {result.best_epoch} of {len(result.history)}")
        say(f"encoder {result.manifest.id} in {result.weights}")
        candidate = project.migration().new_encoder_id
        if candidate == result.manifest.id:
            say(f"next: migrator verify {project.name}")
        else:
            say(f"the candidate is still {candidate} of another run")
            say(f"next: migrator verify {project.name} --run {run}")
