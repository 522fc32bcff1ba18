"""`migrator route`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from migrator.cli.common import json_option, migration_options, open_project, print_facts, print_json


@click.command("route")
@migration_options
@click.option("--key", help="Show the choice for this user, session or query id.")
@json_option
def command(name: str | None, config_path: Path, key: str | None, as_json: bool) -> None:
    """Show which encoder and collection answer queries."""
    from migrator.rollout.route import choose, current_route, describe

    with open_project(config_path, name) as project:
        route = current_route(project.ledger, project.name)
    if key is not None:
        choice = asdict(choose(route, key))
        if as_json:
            print_json({"key": key, **choice})
        else:
            print_facts(list(choice.items()))
        return
    if as_json:
        print_json(describe(route))
        return
    print_facts([(column.replace("_", " "), value) for column, value in describe(route).items()])
