"""`migrator plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator.cli.common import (
    json_option,
    migration_options,
    open_project,
    print_facts,
    print_json,
    progress,
    say,
)
from migrator.evaluation.verdicts import amount
from migrator.formatting import disk_needed, duration, when

if TYPE_CHECKING:
    from migrator.documents import EncoderFacts, Forecast, PlanContent, Range


@click.command("plan")
@migration_options
@json_option
def command(name: str | None, config_path: Path, as_json: bool) -> None:
    """Check the collection and say what the upgrade costs.

    Checks that the old encoder made the stored vectors, measures speed on a sample, names risks, and saves the plan.
    Nothing in the collection is changed.
    """
    from migrator.embedding.agreement import Disagreement
    from migrator.plan.run import make_plan

    with open_project(config_path, name) as project, progress("sampling") as advance:
        try:
            planned = make_plan(project, advance)
        except Disagreement as refused:
            if as_json:
                print_json({"plan": None, "old_encoder_check": refused.to_json()})
            raise
    if as_json:
        print_json({"plan": planned.fingerprint, **planned.content.to_json()})
        return
    _show(planned.fingerprint, planned.content)


def _taken(encoder: EncoderFacts) -> list[tuple[str, str]]:
    """Which part of its weights file an encoder is, where it is not all of it."""
    return [("", f"from its weights: {encoder.weights}")] if encoder.weights else []


def _show(fingerprint: str, plan: PlanContent) -> None:
    collection, check = plan.collection, plan.old_encoder_check
    old, new = plan.old_encoder, plan.new_encoder
    checked = (
        "known by its vectors alone: not checked"
        if check.median_cosine is None
        else f"made the stored vectors: median cosine {check.median_cosine:.3f} over {check.sampled} items"
    )
    print_facts(
        [
            ("plan", f"{fingerprint} for {plan.migration} ({plan.strategy})"),
            ("collection", f"{collection.name}: {collection.items} items, {collection.dim}-d"),
            ("store", f"{collection.server}, {collection.index}, metric {collection.metric}"),
            ("old encoder", old.id if old.arch == "stored" else f"{old.arch} {old.id}"),
            *_taken(old),
            ("", checked),
            ("new encoder", f"{new.arch} {new.id or '(to be trained)'}"),
            *_taken(new),
            ("", new.vectors),
            ("backfill", f"{plan.chunks} chunks, about {duration(plan.backfill_seconds)} of work "
                         f"at {plan.images_per_second:g} images/s"),
            *_expected(plan.forecast),
            ("disk", disk_needed(plan.to_json())),
            ("recommended", f"{plan.recommended.strategy}: {plan.recommended.why}"),
        ]
    )  # fmt: skip
    say("\nthis store")
    for sentence in plan.capabilities:
        say(f"  - {sentence}", hanging="  ")
    say("\nrisks" if plan.risks else "\nno risks found")
    for risk in plan.risks:
        say(f"  - {risk}", hanging="  ")
    say("\nstages")
    for stage, purpose in plan.stages:
        say(f"  {stage:<25} {purpose}", hanging=" " * 26)
    say(f"\nnext: migrator {'train' if new.id is None else 'verify'} {plan.migration}")


def _expected(forecast: Forecast) -> list[tuple[str, str]]:
    """Quality today, and what is expected when, as lines."""
    if forecast.today is None:
        return []
    today = f"{forecast.metric} {forecast.today:.4f} today, on a sample of {forecast.sampled} items"
    if forecast.points[0].value is None:
        return [("expected", f"{today}; plan again once the new encoder is trained")]
    lines = [
        f"{point.value:.4f} with {point.share:.0%} embedded{_loss(point.gain)}"
        + ("" if point.at is None else f", {when(point.at)} UTC if it began now")
        for point in forecast.points
    ]
    return [("expected", today), *(("", line) for line in lines)]


def _loss(gain: Range | None) -> str:
    """A significant loss, shown beside its value."""
    return "" if gain is None or gain.high >= 0 else f" (worse than today by {amount(gain.mean)})"
