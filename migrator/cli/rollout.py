"""`migrator rollout`."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.cli.common import confirm, json_option, migration_options, open_project, print_json, yes_option


@click.command("rollout")
@migration_options
@click.option(
    "--stage",
    type=click.Choice(["prepare", "canary", "backfill", "cutover", "finalize"]),
    required=True,
    help="The stage to open; canary is called once a step.",
)
@click.option("--percent", type=click.IntRange(0, 100), help="canary: this step instead of the next one.")
@click.option(
    "--accept-failures", type=click.IntRange(0), default=0, help="cutover: go on with up to so many failed items."
)
@click.option("--drop-old", is_flag=True, help="finalize: delete the undo log; no rollback after that.")
@json_option
@yes_option
def command(
    name: str | None,
    config_path: Path,
    stage: str,
    percent: int | None,
    accept_failures: int,
    drop_old: bool,
    as_json: bool,
    yes: bool,
) -> None:
    """Open the next stage: prepare, canary, backfill, cutover, finalize."""
    from migrator.rollout.stages import Options, step
    from migrator.status import status_of

    with open_project(config_path, name) as project:
        change = step(project, stage, Options(percent, accept_failures, drop_old))
        confirm(change.says, yes=yes)
        done = change.make()
        following = status_of(project)
    if as_json:
        print_json({"migration": project.name, "stage": stage, "done": done, "next": following.next_command})
        return
    click.echo(done)
    if following.next_command:
        click.echo(f"next: {following.next_command}")
