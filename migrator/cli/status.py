"""`migrator status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.cli.common import json_option, migration_options, open_project, print_facts
from migrator.formatting import duration

if TYPE_CHECKING:
    from migrator.lifecycle.status import Status


@click.command("status")
@migration_options
@json_option
def command(name: str | None, config_path: Path, as_json: bool) -> None:
    """Show where a migration stands and the next command."""
    import json

    from migrator.lifecycle.status import status_of

    with open_project(config_path, name) as project:
        status = status_of(project)
    if as_json:
        click.echo(json.dumps(status.to_json(), indent=2))
        return
    done = f"{status.items_done} of {status.items_total}"
    if status.items_total:
        done += f" ({status.items_done / status.items_total:.1%})"
    chunks = ", ".join(f"{number} {state}" for state, number in sorted(status.chunks.items()))
    route = None if status.epoch is None else f"epoch {status.epoch}, canary {status.canary_percent:g} %"
    rate = None if status.items_per_second is None else f"{status.items_per_second:g} items/s"
    print_facts(
        [
            ("migration", status.migration),
            ("collection", status.collection),
            ("shadow", status.shadow),
            ("stage", f"{status.stage} ({status.state})" + (f", paused: {status.paused}" if status.paused else "")),
            ("plan", status.plan),
            ("old encoder", status.old_encoder),
            ("new encoder", status.new_encoder),
            *_verification(status),
            ("route", route),
            ("items", done if status.chunks else None),
            ("failed", status.items_failed if status.chunks else None),
            ("gone", status.items_gone or None),
            ("chunks", chunks or None),
            ("catch-up", f"{status.catch_up_passes} passes" if status.catch_up_passes else None),
            ("rate", rate),
            ("eta", None if status.eta_seconds is None else duration(status.eta_seconds)),
            ("search", _search(status.search)),
            ("mixed space", "yes: only new-encoder queries are right" if status.mixed_space else "no"),
            ("old vectors", "kept: `migrator rollback` is possible" if status.old_kept else None),
            (
                "next",
                status.next_command or ("one of the next steps" if status.next_steps else "nothing is left to do"),
            ),
        ]
    )


def _verification(status: Status) -> list[tuple[str, str | None]]:
    """How it came out, and what follows, as lines; a loss that the gate allows is no success."""
    invalid = [] if status.verification_invalid is None else [f"opens no stage: {status.verification_invalid}"]
    if status.verification is None:
        return [("verification", line) for line in invalid]
    first, *others = (
        [status.verification]
        if status.verification != "accepted"
        else [click.style(f"accepted: {status.losses[0]}", fg="yellow"), *status.losses[1:]]
    )
    steps = [("next steps" if number == 0 else "", step) for number, step in enumerate(status.next_steps)]
    return [("verification", first), *(("", line) for line in (*others, *invalid)), *steps]


def _search(check: dict[str, Any] | None) -> str | None:
    """The last health check, in a line."""
    if check is None:
        return None
    forecast = "" if check["forecast"] is None else f", forecast {check['forecast']:.4f}"
    outcome = check["outcome"] if check["note"] is None else f"{check['outcome']}: {check['note']}"
    return f"{check['metric']} {check['value']:.4f}{forecast} at {check['share']:.0%} ({outcome}, {check['at']})"
