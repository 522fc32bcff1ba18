"""`migrator schema`."""

from __future__ import annotations

import json

import click


@click.command("schema")
@click.argument("name", type=click.Choice(["plan", "verify", "status", "report", "route"]), metavar="COMMAND")
def command(name: str) -> None:
    """Print the JSON Schema of what a command prints with --json.

    COMMAND is plan, verify, status, report or route. `migrator config --schema` has that of migrations.yaml.
    """
    from migrator.documents import DOCUMENTS

    click.echo(json.dumps(DOCUMENTS[name].model_json_schema(), indent=2))
