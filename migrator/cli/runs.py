"""`migrator runs`."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.cli.common import json_option, migration_options, open_project, print_json, print_table, say
from migrator.evaluation.verdicts import state_of
from migrator.training_runs import RunSummary, list_runs


@click.command("runs")
@migration_options
@json_option
def command(name: str | None, config_path: Path, as_json: bool) -> None:
    """List the training runs side by side, with their validation and verification.

    self and cross are mAP@100 of held-out images, old is what today's encoder reaches there, and P_1 joins them: 0.5 is
    par. The candidate is the run that plan, verify and rollout use; `migrator verify --run NAME` chooses another.
    """
    with open_project(config_path, name) as project:
        runs = list_runs(project.training_folder())
        migration = project.ledger.migration(project.name)
        found = [] if migration is None else project.ledger.verifications(migration.id)
    candidate = None if migration is None else migration.new_encoder_id
    verified = {
        each.new_encoder_id: state_of(each.results) or each.outcome for each in found
    }  # the latest of each encoder
    if as_json:
        print_json(
            {
                "migration": project.name,
                "runs": [
                    {
                        **run.as_json(),
                        "verification": verified.get(run.encoder or ""),
                        "candidate": run.encoder is not None and run.encoder == candidate,
                    }
                    for run in runs
                ],
            }
        )
        return
    if not runs:
        say(f"no training run yet: migrator train {project.name}")
        return
    print_table(
        ("run", "method", "epochs", "P_1", "self", "cross", "old", "verified"),
        [
            (
                f"{run.run}{' (candidate)' if run.encoder is not None and run.encoder == candidate else ''}",
                run.method or "",
                _epochs(run),
                "" if run.p1 is None else f"{run.p1:.3f}",
                *(f"{run.validation[test]:.3f}" if test in run.validation else "" for test in ("self", "cross", "old")),
                verified.get(run.encoder or "", ""),
            )
            for run in runs
        ],
    )
    for run in runs:
        best = f", best epoch {run.best_epoch}" if run.best_epoch else ""
        say(f"{run.run}: {run.state}{best}, {run.encoder or 'no encoder yet'}, in {run.folder}")


def _epochs(run: RunSummary) -> str:
    if not run.epochs:
        return ""
    return f"{run.epochs}/{run.epochs_planned}" if run.epochs_planned else str(run.epochs)
