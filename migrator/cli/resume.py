"""`migrator resume`."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.cli.common import confirm, migration_options, open_project, say, yes_option
from migrator.errors import PreconditionFailed


@click.command("resume")
@migration_options
@yes_option
def command(name: str | None, config_path: Path, yes: bool) -> None:
    """Lift a pause."""
    with open_project(config_path, name) as project:
        migration = project.migration()
        if migration.paused is None:
            raise PreconditionFailed(f"{project.name} is not paused")
        confirm(f"lift the pause of {project.name} ({migration.paused})", yes=yes)
        project.ledger.pause(migration, None)
        say(f"{project.name} continues with the next `migrator backfill {project.name}`")
