"""`migrator train`."""

from __future__ import annotations

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
    yes_option,
)
from migrator.config import Method
from migrator.errors import UsageProblem

if TYPE_CHECKING:
    from trainer.fit import Progress

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
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of a run that was stopped.")
@click.option("--restart", is_flag=True, help="Throw an earlier run away and begin anew.")
@json_option
@yes_option
def command(
    name: str | None, config_path: Path, method: str | None, resume: bool, restart: bool, as_json: bool, yes: bool
) -> None:
    """Train the new encoder to be comparable with the old one.

    Leaves checkpoints, metrics.csv and encoder.safetensors in the artifacts folder. On several GPUs or machines it is
    started by `torchrun ... -m migrator train` or `accelerate launch -m migrator train`.
    """
    from migrator.training import train
    from trainer.processes import is_first_process

    if resume and restart:
        raise UsageProblem("--resume and --restart exclude each other")
    with open_project(config_path, name) as project:
        if is_first_process():
            settings = project.settings.train
            chosen = method or (settings.method if settings else None)
            how = f"train {project.settings.new_encoder.named}" + (f" with {chosen}" if chosen else "")
            again = ", throwing away an earlier run," if restart else ""
            confirm(f"{how}{again} in {project.training_folder()}", yes=yes)
        with progress("training") as advance:

            def report(state: Progress) -> None:
                if state.stage != "train":
                    advance(state.step, state.steps, f"{state.stage}, {state.images_per_second:.0f} images/s")
                    return
                losses = " ".join(f"{key} {value:.3f}" for key, value in state.losses.items())
                step = (state.epoch - 1) * state.steps + state.step
                text = f"epoch {state.epoch}/{state.epochs} {losses} {state.images_per_second:.0f} images/s"
                advance(step, state.epochs * state.steps, text)
                if state.validation:
                    found = ", ".join(f"{key} {value:.3f}" for key, value in state.validation.items())
                    click.echo(f"epoch {state.epoch}/{state.epochs}: {losses}; {found}", err=True)

            result = train(project, method=method, resume=resume, restart=restart, report=report)
        if result is None:  # a process that trained along
            return
        if as_json:
            print_json({"encoder": result.card.id, "weights": str(result.weights), "validation": result.validation})
            return
        print_table(
            ("held-out images", "queries, gallery", "mAP@100"),
            [
                (test, sides, f"{result.validation[test]:.4f}")
                for test, sides in TESTS.items()
                if test in result.validation
            ],
        )
        if result.left_out:
            first = result.left_out[0]
            click.echo(f"{len(result.left_out)} images were left out, for instance {first.path}: {first.reason}")
        if result.best_epoch:
            click.echo(f"weights of epoch {result.best_epoch} of {len(result.history)}")
        click.echo(f"encoder {result.card.id} in {result.weights}")
        click.echo(f"next: migrator verify {project.name}")
