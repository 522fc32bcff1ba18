"""What a report tells, as plain JSON values: from the ledger and the training folder, nothing else is read."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migrator.evaluation.verdicts import state_of
from migrator.ledger import Migration, Plan, Verification, now
from migrator.lifecycle.status import status_of
from migrator.lifecycle.validity import invalid_reason
from migrator.project import Project
from migrator.report.verdict import verdict
from migrator.route import describe
from migrator.training_runs import read_epochs

MAX_FAILURES = 100
"""Item failures that are listed; the others are counted."""


def facts_of(project: Project) -> dict[str, Any]:
    """Everything that is known of the migration, as `migrator report --json` prints it.

    What is not known yet is None or empty. Raises `PreconditionFailed` before the first plan.
    """
    ledger, migration = project.ledger, project.migration()
    plan, verification = ledger.latest_plan(migration.id), ledger.latest_verification(migration.id)
    route = ledger.route(migration.collection)
    events = ledger.events(migration.id)
    failures = ledger.failures(migration.id)
    facts: dict[str, Any] = {
        "made_at": now().isoformat(timespec="seconds"),
        "status": {name: value for name, value in status_of(project).to_json().items() if name != "format"},
        "verification": _verification(project, migration, plan, verification),
        "measured": [
            {"at": _when(event.at), "stage": event.stage, **_health_check(event.detail)}
            for event in events
            if event.event == "measured"
        ],
        "runs": [
            {
                "number": run.id,
                "started_at": _when(run.started_at),
                "seen_at": _when(run.seen_at),
                "items": run.items,
                "chunks": run.chunks,
                "ended": run.ended,
            }
            for run in ledger.runs(migration.id)
        ],
        "failures": {
            "open": len(failures),
            "items": [
                {"id": json.loads(row.item_id), "kind": row.kind, "reason": row.reason, "attempts": row.attempts}
                for row in failures[:MAX_FAILURES]
            ],
        },
        "training": _training(project, migration),
        "plan": None
        if plan is None
        else {"fingerprint": plan.fingerprint, "at": _when(plan.created_at), **plan.content},
        "route": None if route is None else {name: value for name, value in describe(route).items() if name != "salt"},
        "events": [
            {
                "at": _when(event.at),
                "event": event.event,
                "stage": event.stage,
                "actor": event.actor,
                "detail": event.detail,
            }
            for event in events
        ],
    }
    facts = finite(facts)
    return {"verdict": verdict(facts), **facts}


def _health_check(detail: Mapping[str, Any]) -> dict[str, Any]:
    """A health check from the audit log, in which the terms before ledger version 0007 stay as they were written."""
    names = {"look": "interim_analysis", "wrong": "mismatched", "wrong_items": "mismatched_items"}
    return {names.get(key, key): _health_check(value) if key == "read_back" else value for key, value in detail.items()}


def finite(value: Any) -> Any:
    """The same JSON value with None for numbers that are none, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def _verification(
    project: Project, migration: Migration, plan: Plan | None, verification: Verification | None
) -> dict[str, Any] | None:
    if verification is None:
        return None
    return {
        "at": _when(verification.created_at),
        "outcome": verification.outcome,
        "state": state_of(verification.results) or verification.outcome,
        "invalid_reason": invalid_reason(verification, migration, plan, project.settings.verify.max_age),
        "old_encoder": verification.old_encoder_id,
        "new_encoder": verification.new_encoder_id,
        "query_set_sha256": verification.queries_sha256,
        "results": verification.results,
    }


def _training(project: Project, migration: Migration) -> dict[str, Any] | None:
    runs = project.ledger.trainings(migration.id)
    if not runs:
        return None
    # That of the candidate; while there is none, the latest.
    run = next((run for run in reversed(runs) if run.encoder_id == migration.new_encoder_id), runs[-1])
    return {
        "method": run.method,
        "state": run.state,
        "encoder": run.encoder_id,
        "error": run.error,
        "started_at": _when(run.started_at),
        "finished_at": _when(run.finished_at),
        "validation": run.validation,
        "epochs": read_epochs(Path(run.folder) / "metrics.csv"),
    }


def _when(at: dt.datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="seconds")
