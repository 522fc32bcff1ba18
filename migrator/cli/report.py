"""`migrator report`."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.cli.common import json_option, migration_options, open_project, print_json, progress
from migrator.errors import UsageProblem


@click.command("report")
@migration_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file (default: report.html beside the migration's artifacts).",
)
@json_option
def command(name: str | None, config_path: Path, out: Path | None, as_json: bool) -> None:
    """Write one HTML page that says how the migration stands.

    Verdict, tests, forecast and measured quality, examples, plan and audit log, in one file for people and printers.
    With --json the same facts are printed instead.
    """
    if as_json and out is not None:
        raise UsageProblem("--json prints the facts and writes no page: remove --json or --out")
    from migrator.report.facts import facts_of
    from migrator.report.page import write_report

    with open_project(config_path, name) as project:
        if as_json:
            print_json(facts_of(project))
            return
        with progress("images") as advance:
            path = write_report(project, out, advance)
    click.echo(str(path))
