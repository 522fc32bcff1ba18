"""`migrator failures`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from migrator.cli.common import (
    confirm,
    json_option,
    migration_options,
    open_project,
    print_json,
    print_table,
    say,
    yes_option,
)


@click.command("failures")
@migration_options
@click.option("--retry", is_flag=True, help="Let the next backfill run try all of them again.")
@json_option
@yes_option
def command(name: str | None, config_path: Path, retry: bool, as_json: bool, yes: bool) -> None:
    """List items that could not be re-embedded; --retry tries again."""
    with open_project(config_path, name) as project:
        migration = project.migration()
        failures = project.ledger.failures(migration.id)
        chunks = project.ledger.chunks(migration.id, "failed")
        if retry:
            confirm(f"let the backfill try {len(failures)} items and {len(chunks)} chunks again", yes=yes)
            project.ledger.retry_failures(migration)
    if as_json:
        items = [
            {"id": json.loads(row.item_id), "kind": row.kind, "reason": row.reason, "attempts": row.attempts}
            for row in failures
        ]
        failed = [
            {"pass": row.pass_number, "ordinal": row.ordinal, "items": row.items, "error": row.error} for row in chunks
        ]
        print_json({"migration": project.name, "items": items, "chunks": failed, "retried": retry})
        return
    if failures:
        print_table(
            ("item", "kind", "attempts", "reason"),
            [(row.item_id, row.kind, str(row.attempts), row.reason) for row in failures],
        )
    if chunks:
        print_table(
            ("chunk", "items", "error"),
            [(f"{row.pass_number}/{row.ordinal}", str(row.items), row.error or "") for row in chunks],
        )
    if not failures and not chunks:
        say("no failures")
    elif retry:
        say(f"next: migrator backfill {project.name}")
    else:
        say(f"fix what can be fixed, then: migrator failures {project.name} --retry")
