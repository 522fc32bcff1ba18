"""Where a migration stands, from the ledger alone: no store is opened and no model loaded."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from migrator.evaluation.verdicts import losses, state_of
from migrator.ledger import Counts, Migration, Route
from migrator.lifecycle.next_steps import next_steps, situation_of
from migrator.lifecycle.strategy import STRATEGIES
from migrator.lifecycle.validity import EARLIER_VERSION, gallery_of, health_checks, invalid_reason
from migrator.project import Project

RATE_RUNS = 5
"""The last runs from which the rate is taken, of those that worked on the first pass."""


@dataclass(frozen=True, slots=True)
class Status:
    """One migration at one moment."""

    migration: str
    collection: str | None
    strategy: str | None
    shadow: str | None
    """The collection beside it that is being filled."""
    stage: str
    state: str
    plan: str | None
    old_encoder: str | None
    new_encoder: str | None
    verification: str | None
    """Of a verification that counts: pass, accepted, fail or inconclusive. `accepted` passes with a significant loss
    that the gate allows."""
    verification_invalid: str | None
    """Why the latest verification opens no further stage, where one does: the end of a sentence about the migration."""
    losses: list[str]
    """Those of an accepted one, as sentences."""
    next_steps: list[str]
    """Where it did not pass: what can be done about it."""
    paused: str | None
    epoch: int | None
    canary_percent: float | None
    items_total: int
    items_done: int
    items_failed: int
    items_gone: int
    catch_up_passes: int
    chunks: dict[str, int]
    items_per_second: float | None
    eta_seconds: int | None
    search: dict[str, Any] | None
    """What the last health check after a backfill run gave: metric, value, forecast, share, outcome, note."""
    mixed_space: bool
    """Vectors of both encoders may lie in the collection: only new-encoder queries are right."""
    old_kept: bool
    """The undo log, or the old collection of a shadow, is there: a rollback is possible."""
    next_command: str | None

    def to_json(self) -> dict[str, Any]:
        """As `migrator status --json` prints it."""
        return {"format": 1, **asdict(self)}


def status_of(project: Project) -> Status:
    """Reads the ledger once and names the next command."""
    ledger, name = project.ledger, project.name
    migration = ledger.migration(name)
    if migration is None:
        return Status(
            migration=name, collection=None, strategy=None, shadow=None, stage="none", state="none", plan=None,
            old_encoder=None, new_encoder=None, verification=None, verification_invalid=None, losses=[], next_steps=[],
            paused=None, epoch=None, canary_percent=None, items_total=0, items_done=0, items_failed=0, items_gone=0,
            catch_up_passes=0, chunks={}, items_per_second=None, eta_seconds=None, search=None, mixed_space=False,
            old_kept=False, next_command=f"migrator plan {name}",
        )  # fmt: skip
    counts = ledger.counts(migration.id)
    plan = ledger.latest_plan(migration.id)
    route = ledger.route(migration.collection)
    verification = ledger.latest_verification(migration.id)
    reason = invalid_reason(verification, migration, plan, project.settings.verify.max_age)
    results = verification.results if verification is not None and reason in (None, EARLIER_VERSION) else {}
    outcome = state_of(results)
    rate = _rate(project, migration) if migration.state in ("active", "finished") else None
    is_running = (
        migration.state == "active"
        and migration.stage in STRATEGIES[migration.strategy].backfill_stages
        and migration.paused is None
    )
    left = counts.planned - counts.done
    gallery = gallery_of(migration, counts)
    opens = verification is not None and gallery == "old" and migration.state in ("planned", "active")
    return Status(
        migration=name,
        collection=migration.collection,
        strategy=migration.strategy,
        shadow=migration.shadow,
        stage=migration.stage,
        state=migration.state,
        plan=plan.fingerprint if plan else None,
        old_encoder=migration.old_encoder_id,
        new_encoder=migration.new_encoder_id,
        verification=outcome,
        verification_invalid=reason if opens else None,
        losses=losses(results) if outcome == "accepted" else [],
        next_steps=next_steps(results, situation_of(project)) if outcome in ("fail", "inconclusive") else [],
        paused=migration.paused,
        epoch=route.epoch if route else None,
        canary_percent=route.canary_percent if route else None,
        items_total=counts.planned or (plan.content["collection"]["items"] if plan else 0),
        items_done=counts.done,
        items_failed=counts.open_failures,
        items_gone=counts.gone,
        catch_up_passes=max(counts.passes - 1, 0),
        chunks=dict(counts.by_state),
        items_per_second=rate,
        eta_seconds=round(left / rate) if rate and left > 0 and is_running else None,
        search=_last_health_check(project, migration),
        mixed_space=gallery == "mixed",
        old_kept=migration.old_kept,
        next_command=next_command(name, migration, route, counts, outcome if reason is None else None),
    )


def _rate(project: Project, migration: Migration) -> float | None:
    """Items of the first pass per second, while runs worked on it: from a run's start to its last chunk of that pass.

    A catch-up pass reads the whole collection for a few items, and says nothing of how long the rest will take.
    """
    spans, items = project.ledger.first_pass_work(migration.id, runs=RATE_RUNS)
    seconds = _covered(spans)
    return round(items / seconds, 1) if seconds > 0 else None


def _covered(spans: Sequence[tuple[dt.datetime, dt.datetime]]) -> float:
    """Seconds that lie in at least one of the spans: what runs side by side did counts once in time."""
    total, until = 0.0, None
    for start, end in sorted(spans):
        begin = start if until is None else max(start, until)
        if end > begin:
            total += (end - begin).total_seconds()
        until = end if until is None else max(until, end)
    return total


def _last_health_check(project: Project, migration: Migration) -> dict[str, Any] | None:
    checks = health_checks(project.ledger.events(migration.id))
    if not checks:
        return None
    detail = checks[-1].detail
    keys = ("metric", "value", "forecast", "share", "outcome")
    found = {"at": checks[-1].at.isoformat(timespec="seconds"), **{key: detail[key] for key in keys}}
    return {**found, "note": detail.get("note")}


def next_command(
    name: str, migration: Migration, route: Route | None, counts: Counts, verified: str | None
) -> str | None:
    """The command that brings the migration forward; None when nothing is left to do."""
    if migration.state == "rolled_back":
        return f"migrator plan {name}"
    if migration.state == "rolling_back":
        return f"migrator rollback {name}"
    if migration.paused is not None:
        return f"migrator resume {name}"
    if migration.state == "finished":
        return None
    if migration.stage == "planned":
        if migration.new_encoder_id is None:
            return f"migrator train {name}"
        if verified in ("pass", "accepted"):
            return f"migrator rollout {name} --stage prepare"
        # To verify the same encoder on the same queries again gives the same result: the next steps say what helps.
        return f"migrator verify {name}" if verified is None else None
    strategy = STRATEGIES[migration.strategy]
    if migration.stage in strategy.backfill_stages:
        undone = sum(number for state, number in counts.by_state.items() if state != "done")
        if counts.passes == 0 or undone - counts.by_state.get("failed", 0):
            return f"migrator backfill {name}"
        if counts.open_failures or undone:
            return f"migrator failures {name}"
    following = strategy.next_stage(migration.stage, canary_percent=route.canary_percent if route else 0.0)
    return f"migrator rollout {name} --stage {following}"
