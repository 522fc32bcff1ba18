"""`migrator train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
from migrator.errors import UsageProblem

if TYPE_CHECKING:
    from trainer.fit import Progress


@click.command("train")
@migration_options
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of a run that was stopped.")
@click.option("--restart", is_flag=True, help="Throw an earlier run away and begin anew.")
@json_option
@yes_option
def command(name: str | None, config_path: Path, resume: bool, restart: bool, as_json: bool, yes: bool) -> None:
    """Train the new encoder to be comparable with the old one.

    Leaves checkpoints, metrics.csv and encoder.safetensors in the artifacts folder.
    """
    from migrator.training import train

    if resume and restart:
        raise UsageProblem("--resume and --restart exclude each other")
    with open_project(config_path, name) as project:
        settings = project.settings.train
        how = f"train {project.settings.new_encoder.arch}" + (f" with {settings.method}" if settings else "")
        confirm(f"{how}{', throwing away an earlier run,' if restart else ''} in {project.training_folder()}", yes=yes)
        with progress("training") as advance:

            def report(state: Progress) -> None:
                if state.stage == "images":
                    advance(state.step, state.steps, "images read")
                    return
                losses = " ".join(f"{key} {value:.3f}" for key, value in state.losses.items())
                step = (state.epoch - 1) * state.steps + state.step
                advance(step, state.epochs * state.steps, f"epoch {state.epoch}/{state.epochs} {losses}")
                if state.validation:
                    found = ", ".join(f"{key} {value:.3f}" for key, value in state.validation.items())
                    click.echo(f"epoch {state.epoch}/{state.epochs}: {losses}; mAP@100 {found}", err=True)

            result = train(project, resume=resume, restart=restart, report=report)
        if as_json:
            print_json({"encoder": result.card.id, "weights": str(result.weights), "validation": result.validation})
            return
        print_table(
            ("held-out images", "mAP@100"),
            [(test, f"{value:.4f}") for test, value in result.validation.items()],
        )
        if result.left_out:
            first = result.left_out[0]
            click.echo(f"{len(result.left_out)} images were left out, for instance {first}")
        click.echo(f"encoder {result.card.id} in {result.weights}")
        click.echo(f"next: migrator verify {project.name}")
