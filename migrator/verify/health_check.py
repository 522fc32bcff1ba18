"""A look at the collection after each backfill run: does it hold what was written, and does search stay above the gate?

Vectors can be wrong and yet pass every check of integrity. So a sample of what the run wrote is read over a fresh
connection, embedded again and compared; and the questions of the verification are asked again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import ItemId, Store
from migrator.config import FLIPS, Gate
from migrator.embedding.agreement import SAME_ENCODER, as_kept_by, cosines
from migrator.embedding.embed import embed, locate
from migrator.evaluation.gate import Measured, Verdict, gate
from migrator.evaluation.verdicts import Test, amount
from migrator.ledger import Migration
from migrator.lifecycle.validity import looks
from migrator.project import Project
from migrator.verify.backfill_curve import expected
from migrator.verify.baseline import read_answers
from migrator.verify.query_set.draw import read_frozen
from migrator.verify.run import ask_as_is

if TYPE_CHECKING:
    from migrator.trainer.encoders.encoder import Encoder

WRONG_SHARE = 0.05
"""Share of the items read back from which on the backfill pauses. An application may replace an image or two in the
moment between; a broken writer or encoder does not stop at one in twenty."""
NAMED = 5


@dataclass(frozen=True, slots=True)
class Looked:
    """What was seen after a run."""

    says: str
    """All of it in one line; the audit log has it in numbers."""
    pause: str | None
    """Why the backfill must not go on; None while all is well."""


def look(project: Project, migration: Migration, encoder: Encoder, written: Sequence[ItemId], *, run: int) -> Looked:
    """Reads back the items of `written`, asks the questions again, and notes both; pauses the migration if it must.

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
    says: list[str] = []
    reasons: list[str] = []
    with _served(project, migration) as store:
        if written:
            read_back, told, wrong = _read_back(project, migration, store, encoder, written)
            detail["read_back"] = read_back
            says.append(told)
            reasons += wrong
        # Nothing is asked of a shadow before all of it is there.
        if project.settings.backfill.measure and (migration.strategy == "in_place" or share == 1):
            measured, told, below = _measure(project, migration, store, share)
            detail |= measured
            says.append(told)
            reasons += below
    pause = "; ".join(reasons) or None
    project.ledger.note(migration, "measured", detail)
    if pause is not None:
        project.ledger.pause(migration, pause)
    return Looked("; ".join(says), pause)


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


def catch_up_check(project: Project, migration: Migration, encoder: Encoder) -> Looked:
    """The health check that a run did not make, on items drawn from all that is stored, in the last run's name."""
    with _served(project, migration) as store:
        sample = store.sample(project.settings.backfill.read_back, seed=project.settings.verify.seed)
    run = max(run.id for run in project.ledger.runs(migration.id) if run.items)
    return look(project, migration, encoder, sample, run=run)


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
    page = store.read(written, vectors=True, payload=True)
    assert page.vectors is not None
    assert page.payloads is not None
    # What the application has written since bears no stamp, and is its own. A shadow's copies never bear one.
    ours = [
        row
        for row, stamp in enumerate(page.stamps)
        if migration.strategy == "shadow" or stamp == migration.new_encoder_id
    ]
    images = project.images()
    paths = locate(images, [(page.ids[row], page.payloads[row]) for row in ours])
    found = embed(images, paths, [encoder], **project.loading())
    rows = [ours[row] for row in found.rows.tolist()]
    agreement = cosines(page.vectors[rows], found.vectors[0], as_kept_by(store))
    wrong = [page.ids[rows[at]] for at in np.flatnonzero(agreement < SAME_ENCODER).tolist()]
    worst = float(agreement.min()) if len(agreement) else None
    detail = {
        "checked": len(rows),
        "wrong": len(wrong),
        "wrong_items": wrong[:NAMED],
        "worst_cosine": None if worst is None else round(worst, 6),
    }
    says = f"{len(rows)} items read back, {len(wrong)} wrong" if len(rows) else "no item could be read back"
    reasons = []
    if len(wrong) > WRONG_SHARE * len(rows):
        reasons.append(
            f"{len(wrong)} of {len(rows)} items read back, for instance {wrong[0]!r}, do not hold the vector that the "
            f"new encoder gives for their image (least cosine {worst:.3f}): look at the store before "
            f"`migrator resume {project.name}`, or `migrator rollback {project.name}`"
        )
    return detail, says, reasons


def _measure(
    project: Project, migration: Migration, store: Store, share: float
) -> tuple[dict[str, Any], str, list[str]]:
    questions, answers = read_frozen(project, migration), read_answers(project, migration)
    settings = project.settings.verify.gate
    if (
        questions is None
        or answers is None
        or answers.questions_sha256 != questions.sha256
        or answers.new_encoder_id != migration.new_encoder_id
    ):
        return {}, "the questions of the verification are not in the artifacts folder and were not asked", []
    mixed = ask_as_is(project, store, questions, answers.rows, answers.by_new)
    if unknown := mixed.values.keys() - answers.old.keys():
        return {}, f"verify.gate names {', '.join(sorted(unknown))}, which was not verified; nothing was asked", []
    lost = np.where(np.isnan(mixed.firsts_right), np.nan, (answers.firsts_right == 1) & (mixed.firsts_right == 0))
    number = len(looks(project.ledger.events(migration.id))) + 1
    served: Test = "self" if migration.strategy == "shadow" or share == 1 else "lowest"
    verdict = gate(
        Measured(
            old=answers.old,
            new={**mixed.values, FLIPS: lost},
            clusters=mixed.asked.clusters(),
            segments=mixed.asked.segments,
            served=served,
        ),
        _bounds_of(settings, served),
        look=number,
        seed=project.settings.verify.seed,
    )
    note = _loss(verdict)
    value = mixed.means[settings.metric]
    verification = project.ledger.latest_verification(migration.id)
    curve = None if verification is None else verification.results.get("curve")
    forecast = None if curve is None else expected(curve, share)
    detail = {
        "metric": settings.metric,
        "value": value,
        "mixed": mixed.means,
        "interval": None if verdict.interval is None else verdict.interval.as_json(),
        "look": number,
        "forecast": forecast,
        "outcome": "below the gate" if verdict.outcome == "fail" else "ok" if note is None else "accepted",
        "note": note,
    }
    says = f"{settings.metric} {value:.4f}" + ("" if forecast is None else f", forecast {forecast:.4f}")
    says += "" if note is None else f"; {note}"
    if verdict.outcome != "fail":
        return detail, says, []
    failed = [finding.reason for finding in verdict.findings if finding.outcome == "fail"]
    reason = (
        f"search fell below the gate at {share:.0%} of the backfill: {'; '.join(failed)}: "
        f"`migrator report {project.name}` shows where, `migrator rollback {project.name}` takes it back, "
        f"`migrator resume {project.name}` goes on all the same"
    )
    return detail, says, [reason]


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


def _loss(verdict: Verdict) -> str | None:
    """What is said of a significant loss that is not below the gate; None where there is none."""
    if verdict.outcome == "fail":
        return None
    for finding in verdict.findings:
        if finding.note is not None:
            return finding.note
        if finding.gain is not None and finding.gain.high < 0:
            return f"worse by {amount(finding.gain.mean)}; not shown to be below your gate ({finding.bound})"
    return None
