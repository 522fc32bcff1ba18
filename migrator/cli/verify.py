"""`migrator verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.cli.common import json_option, migration_options, open_project, print_json, print_table, progress

if TYPE_CHECKING:
    from migrator.verify.protocol import Verified

MEANING = {
    "old": "old query, old gallery: today's search",
    "cross": "new query, old gallery: the canary",
    "self": "new query, new gallery: after the backfill",
    "reverse": "old query, new gallery: must not happen",
}


@click.command("verify")
@migration_options
@click.option("--mixed", is_flag=True, help="Ask the collection as it is now, with the new encoder; no verdict.")
@json_option
def command(name: str | None, config_path: Path, mixed: bool, as_json: bool) -> int:
    """Prove on sampled queries that search gets no worse.

    Exit code 0 if the gate passes, 3 if it fails or the queries cannot decide.
    """
    from migrator.verify.protocol import measure_mixed, verify

    with open_project(config_path, name) as project, progress("embedding") as advance:

        def report(what: str, done: int, total: int) -> None:
            advance(done, total, what)

        if mixed:
            means = measure_mixed(project, report)
        else:
            verified = verify(project, report)
    if mixed:
        if as_json:
            print_json({"migration": project.name, "mixed": means})
        else:
            print_table(("test", *means), [("mixed: new query, gallery as it is", *_numbers(means))])
        return 0
    if as_json:
        print_json({"migration": project.name, **verified.as_json()})
    else:
        _show(project.name, verified)
    return 0 if verified.verdict.outcome == "pass" else 3


def _numbers(means: dict[str, float]) -> list[str]:
    return [f"{value:.4f}" for value in means.values()]


def _show(name: str, verified: Verified) -> None:
    metrics = next(iter(verified.tests.values()))
    print_table(
        ("test", *metrics), [(f"{test}: {MEANING[test]}", *_numbers(means)) for test, means in verified.tests.items()]
    )
    click.echo(
        f"{verified.queries} queries against {verified.gallery} items; first answers that turned wrong: "
        f"{verified.flips['negative']:.1%}, right: {verified.flips['positive']:.1%}"
    )
    if verified.without_relevant:
        click.echo(f"{verified.without_relevant} queries without a relevant item were left out")
    if verified.without_old_vector:
        click.echo(f"{verified.without_old_vector} queries were left out: no item of the collection has their image")
    if verified.unreadable:
        path, why = next(iter(verified.unreadable.items()))
        click.echo(f"{len(verified.unreadable)} images could not be read, for instance {path}: {why}")
    click.echo(f"verdict: {verified.verdict.outcome}: {'; '.join(verified.verdict.reasons)}")
    if verified.verdict.outcome == "pass":
        click.echo(f"next: migrator rollout {name} --stage prepare")
