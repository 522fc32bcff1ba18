"""`migrator rollback`."""

from __future__ import annotations

from functools import partial
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
    wait_option,
    waiting,
    yes_option,
)


@click.command("rollback")
@migration_options
@wait_option
@json_option
@yes_option
def command(name: str | None, config_path: Path, wait: float, as_json: bool, yes: bool) -> int:
    """Restore every old vector and route queries back.

    Possible at every stage, until finalize drops the undo log. Killed midway, run it again.
    """
    from migrator.lifecycle.strategy import STRATEGIES
    from migrator.rollout.rollback import check_can_roll_back, rollback

    with open_project(config_path, name) as project:
        migration = check_can_roll_back(project)
        if STRATEGIES[migration.strategy].second_collection:
            summary = f"send every query back to {migration.collection} and delete {migration.shadow}"
        else:
            summary = (
                f"restore the old vectors of {migration.collection}, then send every query back to the old encoder"
            )
        if project.old_is_stored and migration.stage in ("cutover", "finalize"):
            summary += "; what was written since the cutover has no model to be embedded with"
        confirm(summary, yes=yes)
        with progress("rollback") as advance:
            tell = partial(say, err=True)
            result = waiting(lambda: rollback(project, advance, tell), seconds=wait)
    problems = {str(item): why for item, why in result.problems.items()}
    if as_json:
        print_json(
            {
                "migration": project.name,
                "restored": result.restored,
                "re_encoded": result.re_encoded,
                "removed": result.removed,
                "stale": list(result.stale),
                "kept_shadow": result.kept_shadow,
                "problems": problems,
            }
        )
    else:
        removed = f", {result.removed} removed" if result.removed else ""
        say(f"rolled back: {result.restored} items restored, {result.re_encoded} embedded again{removed}")
        if result.stale:
            named = ", ".join(map(repr, result.stale[:5])) + (" and more" if len(result.stale) > 5 else "")
            say(
                f"{len(result.stale)} items written since the cutover have the old vector of before: embed them again "
                f"if their images changed: {named}"
            )
        if result.kept_shadow:
            say(f"{result.kept_shadow} is kept, for it alone holds items: take them over, then delete it")
        for item, why in problems.items():
            say(f"item {item} could not be brought back: {why}")
    return 3 if problems or result.stale else 0
