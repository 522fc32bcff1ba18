"""`migrator route`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from migrator.cli.common import json_option, migration_options, open_project, print_facts, print_json
from migrator.ledger import Route
from migrator.route import choose, current_route, describe, writes


@click.command("route")
@migration_options
@click.option("--key", help="Show the choice for this user, session or query id.")
@json_option
def command(name: str | None, config_path: Path, key: str | None, as_json: bool) -> None:
    """Show which encoder and collection answer queries."""
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
    print_facts(
        [
            ("collection", route.collection),
            ("epoch", f"{route.epoch}, since {route.changed_at:%Y-%m-%d %H:%M} UTC"),
            ("phase", route.phase),
            *_lines("queries", _shares(route)),
            *_lines("writes", [f"{each.encoder} in {each.collection}" for each in writes(route)]),
            ("ttl", f"{route.ttl:g} s"),
            ("salt", route.salt),
        ]
    )


def _shares(route: Route) -> list[str]:
    """Which share of the queries each encoder answers, and where."""
    canary = route.canary_percent if route.canary_encoder is not None else 0.0
    shares = []
    if canary < 100:
        shares.append(f"{100 - canary:g} %: {route.query_encoder} in {route.query_collection}")
    if canary > 0:
        shares.append(f"{canary:g} %: {route.canary_encoder} in {route.canary_collection or route.query_collection}")
    return shares


def _lines(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    return [(name if number == 0 else "", value) for number, value in enumerate(values)]
