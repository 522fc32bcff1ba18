"""Whether a verification still counts: it was made for this plan and these encoders, after both, and not long ago."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from migrator.ledger import Migration, Plan, StageEvent, Verification, now


def why_not(
    verification: Verification | None, migration: Migration, plan: Plan | None, max_age: dt.timedelta
) -> str | None:
    """The reason, as the end of a sentence about the migration, why a verification does not count; None if it does.

    Its outcome is another matter.
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
    if verification.created_at < plan.created_at:
        return f"was verified on {verification.created_at:%Y-%m-%d %H:%M}, and planned again since"
    return None


def look_of(earlier: Sequence[Verification], *, new_encoder_id: str, questions_sha256: str) -> int:
    """The number of a look at the data, from 1 on: each pair of encoder and question set is one, the first of them 1.

    To ask the same questions of the same encoder again is no further look. `earlier` is oldest first.
    """
    looks = dict.fromkeys((found.new_encoder_id, found.queries_sha256) for found in earlier)
    looks[new_encoder_id, questions_sha256] = None
    return list(looks).index((new_encoder_id, questions_sha256)) + 1


def looks(events: Sequence[StageEvent]) -> list[StageEvent]:
    """Those of an audit log in which the questions were asked again after a backfill run, in the order given."""
    return [event for event in events if event.event == "measured" and "outcome" in event.detail]
