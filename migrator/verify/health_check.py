"""The health check after each backfill run: does the collection hold what was written, is search above the gate?

Vectors can be wrong and yet pass every check of integrity. So a sample of what the run wrote is read over a fresh
connection, embedded again and compared; and the query set of the verification is evaluated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import ItemId, Store, StoreBusy, StoreUnavailable
from migrator.config import FLIPS, Gate
from migrator.embedding.agreement import SAME_ENCODER, as_kept_by, cosines
from migrator.embedding.embed import embed, locate
from migrator.errors import TemporarilyUnavailable
from migrator.evaluation.gate import Measured, Verdict, gate
from migrator.evaluation.verdicts import Test, amount
from migrator.ledger import Migration
from migrator.lifecycle.strategy import STRATEGIES
from migrator.lifecycle.validity import health_checks
from migrator.project import Project
from migrator.trainer.errors import ImagesUnavailable
from migrator.verify.backfill_curve import expected
from migrator.verify.baseline import read_baseline
from migrator.verify.query_set.pinned import read_pinned
from migrator.verify.run import evaluate

if TYPE_CHECKING:
    from migrator.trainer.encoders.encoder import Encoder

MAX_MISMATCHED = 0.05
"""Share of the items read back above which the backfill pauses. An application may replace an image or two in the
moment between; a broken writer or encoder does not stop at one in twenty."""
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The result of the check after a run."""

    summary: str
    """In one line; the audit log has the numbers."""
    pause: str | None
    """Why the backfill must not continue; None if the check passed."""


def check_health(
    project: Project, migration: Migration, encoder: Encoder, written: Sequence[ItemId], *, run: int
) -> HealthCheck:
    """Reads back the items of `written`, evaluates the query set again and notes both; pauses the migration if needed.

    Raises what store and images raise.
    """
    counts = project.ledger.counts(migration.id)
    share = counts.done / counts.planned if counts.planned else 0.0
    detail: dict[str, Any] = {
        "run": run,
        "items_done": counts.done,
        "items_total": counts.planned,
        "share": round(share, 4),
    }
    summaries: list[str] = []
    reasons: list[str] = []
    with _served(project, migration) as store:
        if written:
            read_back, summary, problems = _read_back(project, migration, store, encoder, written)
            detail["read_back"] = read_back
            summaries.append(summary)
            reasons += problems
        # A shadow is not evaluated before it is complete.
        if project.settings.backfill.measure and (STRATEGIES[migration.strategy].queries_first or share == 1):
            measured, summary, problems = _measure(project, migration, store, share)
            detail |= measured
            summaries.append(summary)
            reasons += problems
    pause = "; ".join(reasons) or None
    project.ledger.note(migration, "measured", detail)
    if pause is not None:
        project.ledger.pause(migration, pause)
    return HealthCheck("; ".join(summaries), pause)


def check_after_run(
    project: Project, migration: Migration, encoder: Encoder, written: Sequence[ItemId] | None, *, run: int
) -> HealthCheck:
    """The health check after a backfill run: of what it wrote, or of what an earlier run wrote before it was killed.

    Its summary is empty where no check is due, and gives the reason where a store or image source is unavailable: the
    run is in the ledger, and the next one, or the cutover, makes the check.
    """
    if not is_check_due(project, migration):
        return HealthCheck("", None)
    try:
        if written is not None:
            return check_health(project, migration, encoder, written, run=run)
        return catch_up_check(project, migration, encoder)
    except (StoreBusy, StoreUnavailable, ImagesUnavailable, TemporarilyUnavailable) as error:
        return HealthCheck(f"not this time: {error}", None)


def is_check_due(project: Project, migration: Migration) -> bool:
    """Whether a backfill run wrote something and no health check came after: it was killed in between, or could not.

    False where the configuration asks for no check.
    """
    settings = project.settings.backfill
    if not (settings.read_back or settings.measure):
        return False
    # `verify --mixed` notes a measurement too, and reads nothing back.
    checks = [event for event in project.ledger.events(migration.id) if "run" in event.detail]
    checks = [event for event in checks if event.event == "measured"]
    return any(
        all(event.detail["run"] != run.id and event.at < run.seen_at for event in checks)
        for run in project.ledger.runs(migration.id)
        if run.items
    )


def catch_up_check(project: Project, migration: Migration, encoder: Encoder) -> HealthCheck:
    """The health check that a run did not make, on items drawn from all that is stored, in the last run's name."""
    with _served(project, migration) as store:
        sample = store.sample(project.settings.backfill.read_back, seed=project.settings.verify.seed)
    run = max(run.id for run in project.ledger.runs(migration.id) if run.items)
    return check_health(project, migration, encoder, sample, run=run)


@contextmanager
def _served(project: Project, migration: Migration) -> Iterator[Store]:
    """Where the new vectors lie, over a connection of its own."""
    with project.store() as store:
        if migration.shadow is None:
            yield store
        else:
            with closing(store.open_collection(migration.shadow)) as beside:
                yield beside


def _read_back(
    project: Project, migration: Migration, store: Store, encoder: Encoder, written: Sequence[ItemId]
) -> tuple[dict[str, Any], str, list[str]]:
    page = store.read(written)
    # What the application has written since bears no stamp, and is its own. A shadow's copies never bear one.
    own = [
        row
        for row, stamp in enumerate(page.stamps)
        if STRATEGIES[migration.strategy].second_collection or stamp == migration.new_encoder_id
    ]
    images = project.images()
    paths = locate(images, [(page.ids[row], page.payloads[row]) for row in own])
    found = embed(images, paths, [encoder], **project.loading())
    rows = [own[row] for row in found.rows.tolist()]
    agreement = cosines(page.vectors[rows], found.vectors[0], as_kept_by(store))
    mismatched = [page.ids[rows[at]] for at in np.flatnonzero(agreement < SAME_ENCODER).tolist()]
    worst = float(agreement.min()) if len(agreement) else None
    detail = {
        "checked": len(rows),
        "mismatched": len(mismatched),
        "mismatched_items": mismatched[:MAX_NAMED],
        "worst_cosine": None if worst is None else round(worst, 6),
    }
    summary = (
        f"{len(rows)} items read back, {len(mismatched)} mismatched" if len(rows) else "no item could be read back"
    )
    reasons = []
    if len(mismatched) > MAX_MISMATCHED * len(rows):
        reasons.append(
            f"{len(mismatched)} of {len(rows)} items read back, for instance {mismatched[0]!r}, do not hold the "
            "vector that the "
            f"new encoder gives for their image (minimum cosine {worst:.3f}): inspect the store before "
            f"`migrator resume {project.name}`, or `migrator rollback {project.name}`"
        )
    return detail, summary, reasons


def _measure(
    project: Project, migration: Migration, store: Store, share: float
) -> tuple[dict[str, Any], str, list[str]]:
    query_set, baseline = read_pinned(project, migration), read_baseline(project, migration)
    settings = project.settings.verify.gate
    if (
        query_set is None
        or baseline is None
        or baseline.query_set_sha256 != query_set.sha256
        or baseline.new_encoder_id != migration.new_encoder_id
    ):
        return {}, "the query set of the verification is not in the artifacts folder: search was not evaluated", []
    current = evaluate(project, store, query_set, baseline.rows, baseline.by_new)
    if unknown := current.values.keys() - baseline.values.keys():
        return (
            {},
            f"verify.gate names {', '.join(sorted(unknown))}, which was not verified: search was not evaluated",
            [],
        )
    lost = np.where(
        np.isnan(current.first_relevant), np.nan, (baseline.first_relevant == 1) & (current.first_relevant == 0)
    )
    number = len(health_checks(project.ledger.events(migration.id))) + 1
    served: Test = "self" if STRATEGIES[migration.strategy].second_collection or share == 1 else "lowest"
    verdict = gate(
        Measured(
            old=baseline.values,
            new={**current.values, FLIPS: lost},
            clusters=current.judged_queries.clusters(),
            segments=current.judged_queries.segments,
            served=served,
        ),
        _bounds_of(settings, served),
        analysis=number,
        seed=project.settings.verify.seed,
    )
    note = _loss_note(verdict)
    value = current.means[settings.metric]
    verification = project.ledger.latest_verification(migration.id)
    curve = None if verification is None else verification.results.get("curve")
    forecast = None if curve is None else expected(curve, share)
    detail = {
        "metric": settings.metric,
        "value": value,
        "mixed": current.means,
        "interval": None if verdict.interval is None else verdict.interval.to_json(),
        "interim_analysis": number,
        "forecast": forecast,
        "outcome": "below the gate" if verdict.outcome == "fail" else "ok" if note is None else "accepted",
        "note": note,
    }
    summary = f"{settings.metric} {value:.4f}" + ("" if forecast is None else f", forecast {forecast:.4f}")
    summary += "" if note is None else f"; {note}"
    if verdict.outcome != "fail":
        return detail, summary, []
    failed = [finding.reason for finding in verdict.findings if finding.outcome == "fail"]
    reason = (
        f"search fell below the gate at {share:.0%} of the backfill: {'; '.join(failed)}: "
        f"`migrator report {project.name}` shows where, `migrator rollback {project.name}` takes it back, "
        f"`migrator resume {project.name}` continues anyway"
    )
    return detail, summary, [reason]


def _bounds_of(settings: Gate, served: Test) -> Gate:
    """The gate for what is served now: the lowest point, whose limit holds for every share, or the end state."""
    applies = {None, served, "lowest"}
    return settings.model_copy(
        update={
            "thresholds": [
                threshold.model_copy(update={"test": None})
                for threshold in settings.thresholds
                if threshold.test in applies
            ]
        }
    )


def _loss_note(verdict: Verdict) -> str | None:
    """The note on a significant loss that is not below the gate; None where there is none."""
    if verdict.outcome == "fail":
        return None
    for finding in verdict.findings:
        if finding.note is not None:
            return finding.note
        if finding.gain is not None and finding.gain.high < 0:
            return f"worse by {amount(finding.gain.mean)}; not shown to be below your gate ({finding.bound})"
    return None
