"""`migrator schedule`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import click

from migrator.cli.common import migration_options, open_project

EVERY = [str(minutes) for minutes in range(1, 31) if 60 % minutes == 0]  # others would bunch up at the full hour

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
@click.option("--every", type=click.Choice(EVERY), default="10", show_default=True, help="Minutes apart.")
@click.option("--systemd", is_flag=True, help="systemd units instead of a crontab line.")
def command(name: str | None, config_path: Path, every: str, systemd: bool) -> None:
    """Print a crontab line or systemd units for the backfill.

    Installs nothing. Each run leaves before the next one is due; one that is late finds the other and leaves with
    exit code 0.
    """
    minutes = int(every)
    with open_project(config_path, name) as project:
        folder, name = project.config.folder, project.name
        found = shutil.which("migrator")
        program = [found] if found else [sys.executable, "-m", "migrator"]
        seconds = minutes * 60 - 20
        args = [*program, *f"backfill {name} --max-seconds {seconds} --yes --config".split(), str(project.config.path)]
        if systemd:
            line = " ".join(map(_systemd_word, args))
            escaped = str(folder).replace("%", "%%")
            click.echo(SYSTEMD.format(name=name, folder=escaped, line=line, minutes=minutes), nl=False)
            return
        log = shlex.quote(str(folder / f"{name}-backfill.log"))
        # In a crontab % means a new line.
        line = f"*/{minutes} * * * * cd {shlex.quote(str(folder))} && {shlex.join(args)} >> {log} 2>&1"
        click.echo(line.replace("%", r"\%"))


def _systemd_word(word: str) -> str:
    # systemd.service(5), "Command lines": quotes and backslashes as in C, % and $ doubled.
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(special, escaped)
    return f'"{word}"' if " " in word or "'" in word else word
