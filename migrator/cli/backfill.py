"""`migrator backfill`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click

from migrator.cli.common import (
    confirm,
    json_option,
    migration_options,
    open_project,
    print_json,
    progress,
    say,
    stop_on_signal,
    yes_option,
)
from migrator.formatting import duration


@click.command("backfill")
@migration_options
@click.option("--max-seconds", type=click.FloatRange(0), metavar="N", help="Start no further chunk after N seconds.")
@click.option("--max-items", type=click.IntRange(1), metavar="N", help="Start no further chunk after N items.")
@json_option
@yes_option
def command(
    name: str | None, config_path: Path, max_seconds: float | None, max_items: int | None, as_json: bool, yes: bool
) -> int:
    """Re-embed stored images in one bounded run, as cron starts it.

    Runs that overlap or are killed do no harm: the same command continues. SIGTERM or Ctrl-C finishes the chunk in
    flight and leaves with exit code 130; a second one leaves at once.
    """
    from migrator.backfill.run import Progress, backfill, check_stage
    from migrator.lifecycle.status import status_of
    from migrator.verify.health_check import check_after_run

    with open_project(config_path, name) as project:
        migration = check_stage(project)
        confirm(f"re-embed items of {migration.collection} with {migration.new_encoder_id}", yes=yes)
        with stop_on_signal("chunk") as stop, progress("backfill") as advance:

            def report(state: Progress) -> None:
                advance(state.done, state.total, f"catch-up pass {state.pass_number}" if state.pass_number else "")

            summary, written = backfill(project, max_seconds=max_seconds, max_items=max_items, stop=stop, report=report)
            if written is not None:
                checked = check_after_run(project, migration, written.encoder, written.sample, run=written.run_id)
                summary = replace(summary, health_check=checked.summary)
                if checked.pause is not None:
                    summary = replace(summary, ended="paused", message=f"paused: {checked.pause}")
        following = status_of(project).next_command
    if as_json:
        print_json({"migration": project.name, **asdict(summary), "next": following})
    else:
        if summary.items or not summary.message:
            say(
                f"{summary.ended}: {summary.items} items in {summary.chunks} chunks, {summary.failed} failed, "
                f"{summary.gone} gone, {duration(summary.seconds)}"
            )
        if summary.health_check:
            say(f"health check: {summary.health_check}")
        if summary.message:
            say(summary.message)
        if following:
            say(f"next: {following}")
    if summary.ended == "paused" and summary.items:  # by what this run saw, not by somebody before it
        return 3
    return {"interrupted": 130, "stuck": 3}.get(summary.ended, 0)
