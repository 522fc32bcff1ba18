"""`migrator init`."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.errors import UsageProblem


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("migrations.yaml"))
def command(path: Path) -> None:
    """Write a commented migrations.yaml to begin with."""
    from migrator.config_template import TEMPLATE

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise UsageProblem(f"{path} is there already: remove it, or give another path") from None
    except OSError as error:
        raise UsageProblem(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {path}: fill it in, then `migrator config` checks it and `migrator plan` begins")
