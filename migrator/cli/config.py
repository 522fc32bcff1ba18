"""`migrator config`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("config")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("migrations.yaml"),
    show_default=True,
    help="The configuration file.",
)
@click.option("--schema", "show_schema", is_flag=True, help="Print the file's JSON Schema instead.")
def command(config_path: Path, show_schema: bool) -> None:
    """Check the configuration; print it or its JSON Schema.

    Printed is what migrator understood, defaults filled in and secrets masked.
    """
    from migrator.config import json_schema, load_config

    click.echo(json.dumps(json_schema() if show_schema else load_config(config_path).redacted(), indent=2))
