"""One command takes everything back, whatever the strategy and the stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep

from migrator.adapters.base import ItemId, StoreBusy
from migrator.errors import InUse, PreconditionFailed
from migrator.ledger import Migration
from migrator.lifecycle.freshness import check_same_collection
from migrator.lifecycle.strategy import STRATEGIES
from migrator.project import Project
from migrator.rollout import write_alias
from migrator.rollout.clients import Tell, wait_for_clients
from migrator.rollout.in_place import Restore
from migrator.rollout.shadow import take_back
from migrator.route import initial_route

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.2
"""Seconds between two reads of the leases."""
NOTICE_INTERVAL = 15.0
"""Seconds between two lines that say what is waited for."""

Report = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What a rollback did."""

    restored: int = 0
    """Items whose old vector was put back. None with a shadow, which leaves the old collection as it is."""
    re_encoded: int = 0
    """Items that the application wrote with the new encoder, embedded again with the old one."""
    removed: int = 0
    """Items that the application deleted in the shadow after the cutover, and that are now gone here too."""
    stale: Sequence[ItemId] = ()
    """Items that the application wrote with the new encoder and that have their earlier old vector: there is no old
    model, and their image may have changed."""
    kept_shadow: str | None = None
    """The shadow, where it alone holds items, which only an old model, or another store, could have brought back."""
    problems: Mapping[ItemId, str] = field(default_factory=dict)
    """Items that could not be embedded again, with the reason."""


def check_can_roll_back(project: Project) -> Migration:
    """The migration, if there is something to take back and a way to do it."""
    migration = project.migration()
    if migration.state == "planned":
        raise PreconditionFailed(f"{project.name} has not begun: there is nothing to roll back")
    if migration.state == "rolled_back":
        raise PreconditionFailed(f"{project.name} has been rolled back already: next is `migrator plan {project.name}`")
    if migration.state == "finished" and not migration.old_kept:
        raise PreconditionFailed(
            f"{project.name} is finished and its old vectors were dropped: "
            "migrate again, with the old encoder as the new one, if there is a model of it"
        )
    return migration


def rollback(project: Project, report: Report = lambda _done, _of: None, tell: Tell = lambda _: None) -> RolledBack:
    """Restores the old state, then the route. Killed at any point, the same command continues where it was.

    `tell` gets a line for each thing that it waits for.
    """
    migration = check_can_roll_back(project)
    result = RolledBack()
    second_collection = STRATEGIES[migration.strategy].second_collection
    if second_collection or project.ledger.counts(migration.id).passes > 0:
        with project.store() as store:
            check_same_collection(project, store)  # before anything is stopped or changed
        if migration.state != "rolling_back":
            # From here on no backfill run gets or finishes a chunk.
            migration = project.ledger.move(migration, state="rolling_back", event="rollback begins")
        if not second_collection:
            write_alias.delete(project, migration)
        wait_for_leases(project, migration)
        try:
            if second_collection:
                result = _take_back(project, migration, report, tell)
            else:
                result = _restore(project, migration, report)
        except StoreBusy as busy:
            raise InUse(f"{busy}: it leaves after its chunk; then again `migrator rollback {project.name}`") from busy
    elif migration.stage == "backfill":
        write_alias.delete(project, migration)
    route = project.ledger.route(migration.collection)
    assert route is not None
    project.ledger.move(
        migration,
        state="rolled_back",
        event="rolled back",
        detail={
            "restored": result.restored,
            "re_encoded": result.re_encoded,
            "removed": result.removed,
            "stale": len(result.stale),
            "problems": len(result.problems),
        },
        route=initial_route(migration, salt=route.salt, epoch=route.epoch),
        old_kept=False,
    )
    # Last: with them a repeated call knows what was changed and what was not.
    project.undo_log(migration).drop()
    project.copy_log(migration).drop()
    if not second_collection and migration.stage in ("cutover", "finalize"):
        wait_for_clients(project, route.epoch + 1, tell)  # an application that writes after this writes old vectors
    return result


def wait_for_leases(project: Project, migration: Migration) -> None:
    """Returns once no backfill run can write any more.

    Runs hear of the rollback with their next heartbeat and leave. One that is frozen or cut off does not, but its lease
    ends by the ledger's clock, no lease is prolonged any more, and no request is sent that could outlast one.
    """
    said = 0.0
    while held := project.ledger.live_leases(migration.id):
        if monotonic() - said >= NOTICE_INTERVAL:
            said = monotonic()
            log.warning(
                "waiting for a backfill run (%s) to leave its chunk: until %s UTC at the latest",
                held[0].lease_owner,
                max(chunk.lease_until for chunk in held if chunk.lease_until is not None).strftime("%H:%M:%S"),
            )
        sleep(POLL_INTERVAL)


def _restore(project: Project, migration: Migration, report: Report) -> RolledBack:
    with project.store(write=True) as store:
        restore = Restore(project, migration, store, report)
        restore.run()
    return RolledBack(restore.restored, restore.re_encoded, 0, restore.stale, None, restore.problems)


def _take_back(project: Project, migration: Migration, report: Report, tell: Tell) -> RolledBack:
    back = take_back(project, migration, report, tell)
    return RolledBack(0, back.re_encoded, back.removed, list(back.stale), back.kept, back.problems)
