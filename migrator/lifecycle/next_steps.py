"""What can be done where the gate did not pass, in sentences with the commands; nothing heavy is imported here.

To verify the same encoder again on the same queries gives the same result, so that is never one of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from migrator.config import POST_HOC, Method, MinGain
from migrator.errors import ConfigError
from migrator.lifecycle.strategy import STRATEGIES
from migrator.training_runs import list_runs

if TYPE_CHECKING:
    from migrator.project import Project

MAX_SAMPLE = 1_000_000
"""Of `verify.sample`."""
NEXT_METHOD: dict[Method, Method] = {
    "advbct": "bct",
    "bct": "lce",
    "lce": "hot_refresh",
    "hot_refresh": "advbct",
    "independent": "advbct",
    "procrustes": "ridge",
    "ridge": "residual_mlp",
    "residual_mlp": "procrustes",
}
"""What to try after a method: one that trains an encoder after another of these, a map after a map."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the steps depend on, apart from what was measured."""

    name: str
    active: bool
    """Queries may be with the new encoder already; it cannot be exchanged before a rollback."""
    in_place: bool
    method: Method | None
    """The method to try next; None where nothing is trained here."""
    labels_needed: bool
    """By that method, where the one before needed none."""
    independent: bool
    """Whether an encoder can be trained here without regard to the old one."""
    shadow_refused: bool
    """The store cannot take the whole collection into a second one."""
    remove_for_shadow: tuple[str, ...]
    """Keys of the configuration that a shadow does not have."""
    queries_file: str | None
    labelled: bool
    items: int | None
    """Of the collection, where they are the queries."""


def situation_of(project: Project) -> Situation:
    """Reads configuration and ledger. Raises `PreconditionFailed` before the first plan."""
    settings, migration = project.settings, project.migration()
    plan = project.ledger.latest_plan(migration.id)
    content = {} if plan is None else plan.content
    train, gains = settings.train, settings.verify.gate.min_gain
    remove = ["backfill.order"] if settings.backfill.order != "id" else []
    if isinstance(gains, MinGain):
        remove += [
            f"verify.gate.min_gain.{test}"
            for test in ("cross", "lowest")
            if test in gains.model_dump(exclude_none=True)
        ]
    method = None if train is None else _untried(project, train.method)
    return Situation(
        name=project.name,
        active=migration.state != "planned",
        in_place=not STRATEGIES[migration.strategy].second_collection,
        method=method,
        labels_needed=train is not None and train.method == "hot_refresh" and train.pseudo_classes is None,
        independent=train is not None and settings.new_encoder.weights is None,
        shadow_refused=content.get("shadow_refused") is not None,
        remove_for_shadow=tuple(remove),
        queries_file=None if settings.verify.queries is None else settings.verify.queries.name,
        labelled=settings.verify.label is not None or settings.verify.queries is not None,
        items=None if settings.verify.queries is not None else (content.get("collection") or {}).get("items"),
    )


def _untried(project: Project, method: Method) -> Method:
    """A method that no run of the migration has had yet, where there is one; else the one after `method`."""
    if project.settings.new_encoder.weights is not None and method not in POST_HOC:
        method = "residual_mlp"  # the encoder is finished: a map behind it is all that can be trained
    tried: set[str | None] = {method}
    with suppress(ConfigError):  # the artifacts lie on a server: nothing was trained here
        tried |= {run.method for run in list_runs(project.training_folder())}
    following = NEXT_METHOD[method]
    for _ in NEXT_METHOD:
        if following not in tried:
            return following
        following = NEXT_METHOD[following]
    return NEXT_METHOD[method]


def next_steps(results: Mapping[str, Any], situation: Situation) -> list[str]:
    """The steps, the one that changes least first; empty for a verification that passed."""
    if results.get("outcome") not in ("fail", "inconclusive"):
        return []
    steps = [_queries(results, situation), _method(situation), _shadow(results, situation), _stay(situation)]
    return [step for step in steps if step is not None]


def _queries(results: Mapping[str, Any], situation: Situation) -> str | None:
    """More queries decide what is open; what has failed they do not change."""
    if results["outcome"] != "inconclusive":
        return None
    open_ = [finding for finding in results.get("findings") or [] if finding.get("outcome") == "inconclusive"]
    needed = max((finding.get("queries_needed") or 0 for finding in open_), default=0)
    if not needed:
        if any(finding.get("interval") for finding in open_):
            return None  # too close to the limit for any number
        return f"Judge it on queries of more classes: {_source(situation, None)}."
    used = max(finding.get("queries") or 0 for finding in open_)
    return (
        f"Judge it on more queries: about {needed:,} judged queries would probably decide, {used:,} were used. "
        f"{_source(situation, min(needed, MAX_SAMPLE))}."
    )


def _source(situation: Situation, needed: int | None) -> str:
    sample = "" if needed is None else f"Set `verify.sample: {needed}`"
    again = f"`migrator verify {situation.name} --resample-queries`"
    if situation.queries_file is not None:
        add = f"list the further ones in {situation.queries_file}"
    elif not situation.labelled:
        add = (
            "say which items belong together with `verify.label`, or list images with their classes in `verify.queries`"
        )
    elif needed is not None and situation.items is not None and needed > situation.items:
        add = f"list further images with their classes in `verify.queries`, as there are only {situation.items:,} items"
    elif needed is None:
        add = "list images of other classes in `verify.queries`"
    else:
        return f"{sample}, then {again}"
    return f"{sample}, {add}, then {again}" if sample else f"{add}, then {again}"


def _method(situation: Situation) -> str:
    name = situation.name
    verify = f"then `migrator verify {name}`"
    first = f"`migrator rollback {name}` and `migrator plan {name}` first, " if situation.active else ""
    if situation.method is None:
        return f"Try another encoder: {first}put its file into `new_encoder.weights`, `migrator plan {name}`, {verify}."
    labels = ", which needs labels or `train.pseudo_classes`" if situation.labels_needed else ""
    method = situation.method
    return (
        f"Train with another method{labels}: {first}`migrator train {name} --method {method} --run {method}`, then "
        f"`migrator verify {name} --run {method}`."
    )


def _shadow(results: Mapping[str, Any], situation: Situation) -> str | None:
    """Without mixed galleries only the end state counts; a shadow's encoder need not be comparable with the old one."""
    if not situation.in_place or situation.shadow_refused:
        return None
    name = situation.name
    change = "set `rollout.strategy: shadow`"
    if situation.remove_for_shadow:
        change += f", remove {' and '.join(f'`{key}`' for key in situation.remove_for_shadow)}"
    first = f"`migrator rollback {name}` first, " if situation.active else ""
    end = [finding for finding in results.get("findings") or [] if finding.get("test") == "self"]
    if not any(finding.get("outcome") == "fail" for finding in end):
        return (
            f"Fill a second collection, so that no query meets old and new vectors together: {first}{change}, "
            f"`migrator plan {name}`, then `migrator verify {name}`."
        )
    if not situation.independent:
        return None  # the end state of this encoder is as bad beside the collection
    return (
        "Fill a second collection with an encoder that owes nothing to the old one, and may be better for it: "
        f"{first}{change}, `migrator plan {name}`, `migrator train {name} --method independent --run independent`, "
        f"then `migrator verify {name} --run independent`."
    )


def _stay(situation: Situation) -> str:
    if situation.active:
        return (
            f"Stay with the old encoder: `migrator rollback {situation.name}` sends every query back to it; no stored "
            "vector is lost."
        )
    return (
        "Stay with the old encoder: it answers every query as before, no stored vector was changed, and there is "
        "nothing to run."
    )
