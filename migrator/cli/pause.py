"""`migrator pause`."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.cli.common import confirm, migration_options, open_project, say, yes_option


@click.command("pause")
@migration_options
@click.option("--reason", default="paused by hand", show_default=True, help="Shown by status until resumed.")
@yes_option
def command(name: str | None, config_path: Path, reason: str, yes: bool) -> None:
    """Ask the backfill to stop at its next chunk."""
    with open_project(config_path, name) as project:
        migration = project.migration()
        confirm(f"pause {project.name}: a running backfill leaves after its chunk, new runs do nothing", yes=yes)
        project.ledger.pause(migration, reason)
        say(f"{project.name} is paused; lift it with `migrator resume {project.name}`")
