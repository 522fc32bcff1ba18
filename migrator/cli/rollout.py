"""`migrator rollout`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from migrator.lifecycle.strategy import Stage


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
    stage: Stage,
    percent: int | None,
    max_failures: int,
    drop_old: bool,
    wait: float,
    as_json: bool,
    yes: bool,
) -> None:
    """Open the next stage: prepare, canary, backfill, cutover, finalize."""
    from migrator.lifecycle.status import status_of
    from migrator.rollout.stages import Options, open_transition

    with open_project(config_path, name) as project:
        options = Options(percent, max_failures, drop_old, tell=partial(say, err=True))
        transition = waiting(lambda: open_transition(project, stage, options), seconds=wait)
        confirm(transition.summary(), yes=yes)
        # Meanwhile another process may have changed what was checked.
        done = waiting(transition.run, seconds=wait, again=lambda: open_transition(project, stage, options).run())
        following = status_of(project)
    if as_json:
        print_json({"migration": project.name, "stage": stage, "done": done, "next": following.next_command})
        return
    say(done)
    if following.next_command:
        say(f"next: {following.next_command}")
