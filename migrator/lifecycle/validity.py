"""Whether a verification still counts: it was made for this plan and these encoders, and not long ago.

And of which encoder the vectors are that queries meet, which decides what can be measured.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Literal, TypeAlias

from migrator.evaluation.verdicts import covers_tests
from migrator.ledger import Counts, Migration, Plan, StageEvent, Verification, now
from migrator.lifecycle.strategy import STRATEGIES

Gallery: TypeAlias = Literal["old", "mixed", "new"]

EARLIER_VERSION = "was verified by an earlier version, whose gate did not cover the backfill and the end state"
"""The last reason that is checked: a verification that is invalid by it alone is still shown."""


def invalid_reason(
    verification: Verification | None, migration: Migration, plan: Plan | None, max_age: dt.timedelta
) -> str | None:
    """The reason, as the end of a sentence about the migration, why a verification does not count; None if it does.

    A plan that was made again from the same facts has the same fingerprint, and keeps it. Its outcome is another
    matter.
    """
    if verification is None:
        return "has not been verified"
    encoders = (verification.old_encoder_id, verification.new_encoder_id)
    if encoders != (migration.old_encoder_id, migration.new_encoder_id):
        return f"was verified with another encoder ({verification.new_encoder_id})"
    if plan is None or verification.plan_fingerprint != plan.fingerprint:
        return f"was verified under another plan ({verification.plan_fingerprint})"
    if now() - verification.created_at > max_age:
        return f"was verified on {verification.created_at:%Y-%m-%d}, longer ago than verify.max_age"
    if not covers_tests(verification.results):
        return EARLIER_VERSION
    return None


def gallery_of(migration: Migration, counts: Counts) -> Gallery:
    """Whose vectors queries meet: the old encoder's, the new one's, or, in place and meanwhile, those of both.

    A shadow keeps them apart. Items that failed in place keep their old vector after the cutover.
    """
    moved = migration.stage in ("cutover", "finalize") and migration.state in ("active", "finished")
    if STRATEGIES[migration.strategy].second_collection:
        return "new" if moved else "old"
    if migration.state == "rolling_back":
        return "mixed"
    begun = counts.passes > 0 and migration.state in ("active", "finished")
    if begun and (migration.stage == "backfill" or counts.open_failures > 0):
        return "mixed"
    return "new" if moved else "old"


def interim_analysis_of(earlier: Sequence[Verification], *, new_encoder_id: str, query_set_sha256: str) -> int:
    """The number of an interim analysis, from 1 on: each pair of encoder and query set is one, the first of them 1.

    To evaluate the same encoder on the same query set again is no further analysis. `earlier` is oldest first.
    """
    analyses = dict.fromkeys((found.new_encoder_id, found.queries_sha256) for found in earlier)
    analyses[new_encoder_id, query_set_sha256] = None
    return list(analyses).index((new_encoder_id, query_set_sha256)) + 1


def health_checks(events: Sequence[StageEvent]) -> list[StageEvent]:
    """The health checks of an audit log that evaluated the query set, in the order given."""
    return [event for event in events if event.event == "measured" and "outcome" in event.detail]
