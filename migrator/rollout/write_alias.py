"""The alias that a backfill in place writes through: a rollback deletes it first, as a fence at the server.

A worker may be frozen when a part of its request is already sent, and the rest follows when it wakes up. No check of
its own can stop that, but the server can: the request is addressed to an alias that is gone by then.
"""

from __future__ import annotations

from migrator.adapters.base import StoreRejected
from migrator.ledger import Migration
from migrator.project import Project
from migrator.rollout.clients import Tell


def create(project: Project, migration: Migration, tell: Tell) -> None:
    """Before the backfill stage opens. Where the server forbids it, the backfill writes to the collection itself."""
    with project.store() as store:
        try:
            store.create_write_alias(project.write_alias(migration))
        except StoreRejected as refusal:
            tell(
                f"the store lets this user create no alias ({refusal}): before a rollback, end workers that are "
                "frozen (kill -KILL), so that none of them sends the rest of a request afterwards"
            )


def delete(project: Project, migration: Migration) -> None:
    """From here on no request of a backfill changes an item, not even one that is half sent."""
    with project.store() as store:
        store.delete_write_alias(project.write_alias(migration))
