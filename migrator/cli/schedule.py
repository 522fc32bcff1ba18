"""`migrator schedule`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import click

from migrator.cli.common import migration_options, open_project

SYSTEMD = """\
# ~/.config/systemd/user/migrator-{name}.service
[Unit]
Description=Backfill of {name}

[Service]
Type=oneshot
WorkingDirectory={folder}
ExecStart={line}
SuccessExitStatus=130
Nice=10

# ~/.config/systemd/user/migrator-{name}.timer
[Unit]
Description=Backfill of {name}, every {minutes} minutes

[Timer]
OnCalendar=*:0/{minutes}

[Install]
WantedBy=timers.target
"""


@click.command("schedule")
@migration_options
@click.option("--every", "minutes", type=click.IntRange(1, 59), default=10, show_default=True, help="Minutes apart.")
@click.option("--systemd", is_flag=True, help="systemd units instead of a crontab line.")
def command(name: str | None, config_path: Path, minutes: int, systemd: bool) -> None:
    """Print a crontab line or systemd units for the backfill. Installs nothing.

    Each run leaves before the next one is due; one that is late finds the other and leaves with exit code 0.
    """
    with open_project(config_path, name) as project:
        folder, name = project.config.folder, project.name
        program = shutil.which("migrator") or f"{sys.executable} -m migrator"
        seconds = minutes * 60 - 20
        line = (
            f"{program} backfill {name} --config {shlex.quote(str(project.config.path))} --max-seconds {seconds} --yes"
        )
        if systemd:
            click.echo(
                SYSTEMD.format(name=name, folder=folder, line=line.replace("%", "%%"), minutes=minutes), nl=False
            )
            return
        log = shlex.quote(str(folder / f"{name}-backfill.log"))
        # In a crontab % means a new line.
        click.echo(f"*/{minutes} * * * * cd {shlex.quote(str(folder))} && {line} >> {log} 2>&1".replace("%", r"\%"))
