"""`migrator rollout`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from migrator.cli.common import (
    confirm,
    json_option,
    migration_options,
    open_project,
    print_json,
    say,
    wait_option,
    waiting,
    yes_option,
)


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
    "--max-failures",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="cutover: continue with up to N failed items.",
)
@click.option("--drop-old", is_flag=True, help="finalize: delete the undo log; no rollback after that.")
@wait_option
@json_option
@yes_option
def command(
    name: str | None,
    config_path: Path,
    stage: str,
    percent: int | None,
    max_failures: int,
    drop_old: bool,
    wait: float,
    as_json: bool,
    yes: bool,
) -> None:
    """Open the next stage: prepare, canary, backfill, cutover, finalize."""
    from migrator.lifecycle.status import status_of
    from migrator.rollout.stages import Options, step

    with open_project(config_path, name) as project:
        options = Options(percent, max_failures, drop_old, tell=partial(say, err=True))
        change = waiting(lambda: step(project, stage, options), seconds=wait)
        confirm(change.says, yes=yes)
        # Meanwhile another process may have changed what was checked.
        done = waiting(change.make, seconds=wait, again=lambda: step(project, stage, options).make())
        following = status_of(project)
    if as_json:
        print_json({"migration": project.name, "stage": stage, "done": done, "next": following.next_command})
        return
    say(done)
    if following.next_command:
        say(f"next: {following.next_command}")
