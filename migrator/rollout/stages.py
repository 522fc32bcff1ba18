"""The state machine of a rollout. Each stage has guards that say which command comes first, and one change.

in place: prepare -> canary (step by step to 100 %) -> backfill -> cutover -> finalize
shadow:   prepare -> backfill -> canary (step by step to 100 %) -> cutover -> finalize

In place, old queries must never meet new vectors, so the queries move first. A shadow is filled before it is searched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migrator.adapters.base import Store
from migrator.errors import PreconditionFailed, UsageProblem
from migrator.evaluation.verdicts import losses
from migrator.ledger import Migration, Plan, Route
from migrator.lifecycle.validity import invalid_reason
from migrator.plan.run import check_fresh, check_shadow, check_unmixed
from migrator.project import Project
from migrator.rollout import shadow, write_alias
from migrator.rollout.clients import Tell, wait_for_clients
from migrator.route import initial_route
from migrator.verify.health_check import catch_up_check, is_check_due

READ_BACK = 256
"""Items read over a fresh connection after the cutover's publication, to see that what was written is there."""

BEFORE_CUTOVER = {
    "at_once": "",
    "on_publish": "publish the index and ",
    "at_cutover": "rebuild and publish the index, and ",
}
"""What a cutover in place does first, by the time at which the store makes written vectors visible."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may add to a stage."""

    percent: int | None = None
    max_failures: int = 0
    drop_old: bool = False
    tell: Tell = lambda _: None
    """Gets a line for each thing that a stage waits for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One stage's change: checked, described, not yet made."""

    says: str
    """What is about to happen, in one sentence."""
    make: Callable[[], str]
    """Makes the change; returns what was done."""


def step(project: Project, stage: str, options: Options) -> Step:
    """Checks the guards of `stage` and returns its change.

    Raises `PreconditionFailed` naming the command that comes first.
    """
    migration = project.migration()
    if migration.state == "rolling_back":
        raise PreconditionFailed(f"{project.name} is being rolled back: finish with `migrator rollback {project.name}`")
    if migration.state == "rolled_back":
        raise PreconditionFailed(f"{project.name} was rolled back: start again with `migrator plan {project.name}`")
    change = _STEPS[stage](project, migration, options)
    accepted = _accepted_losses(project, migration)
    return Step(f"{change.says}{accepted}", lambda: f"{change.make()}{accepted}") if accepted else change


def _accepted_losses(project: Project, migration: Migration) -> str:
    """What is said beside every stage of a migration that makes search worse, by leave of its gate."""
    found = project.ledger.latest_verification(migration.id)
    return "" if found is None else "".join(f"; search {loss}" for loss in losses(found.results))


def _prepare(project: Project, migration: Migration, _: Options) -> Step:
    if migration.state != "planned":
        raise PreconditionFailed(
            f"{project.name} is past prepare (stage {migration.stage}): `migrator status {project.name}`"
        )
    if other := project.ledger.other_owner(migration):
        if other.state == "finished":
            raise PreconditionFailed(
                f"{other.name} still keeps old vectors of {migration.collection}: give them up with "
                f"`migrator rollout {other.name} --stage finalize --drop-old`"
            )
        raise PreconditionFailed(f"{other.name} is active on {migration.collection}: finish it or roll it back first")
    with project.store() as store:
        plan = check_fresh(project, store)
        check_unmixed(project, store, *project.encoder_ids())
        beside = shadow.shadow_name(migration) if migration.strategy == "shadow" else None
        if beside is not None:
            check_shadow(store, project.settings.new_encoder.dim)
        if beside is not None and store.exists(beside):
            raise PreconditionFailed(f"{beside} is there already and not this migration's: remove it, or plan again")
        _check_encoders(project, store)
    check_verified(project, migration, plan)
    route = project.ledger.route(migration.collection)

    def make() -> str:
        project.ledger.move(
            migration,
            stage="prepare",
            state="active",
            event="prepare",
            route=initial_route(
                migration,
                salt=secrets.token_hex(8),
                epoch=route.epoch if route else 0,
                ttl=project.settings.rollout.route_ttl,
            ),
            old_kept=True,
            shadow=beside,
        )
        return f"{migration.collection} is claimed; every query goes to the old encoder {migration.old_encoder_id}"

    return Step(f"reserve {migration.collection} and write its route, with every query at the old encoder", make)


def check_verified(project: Project, migration: Migration, plan: Plan) -> None:
    """Refuses unless the latest verification passed, for these encoders and this plan, and is young enough."""
    name = project.name
    found = project.ledger.latest_verification(migration.id)
    reason = invalid_reason(found, migration, plan, project.settings.verify.max_age)
    if found is None or reason is not None:
        raise PreconditionFailed(f"{name} {reason}: `migrator verify {name}`")
    if found.outcome != "pass":
        raise PreconditionFailed(
            f"the verification of {name} came out as {found.outcome}: {'; '.join(found.results['reasons'])}: "
            f"`migrator status {name}` lists the next steps"
        )


def _check_encoders(project: Project, store: Store) -> None:
    """Both encoders are what they were when they were planned, trained and verified."""
    project.encoder_ids()
    project.check_old_encoder(store)
    project.new_encoder()


def _canary(project: Project, migration: Migration, options: Options) -> Step:
    name = project.name
    in_place = migration.strategy == "in_place"
    if migration.stage == "planned":
        raise PreconditionFailed(f"{name} is not prepared: `migrator rollout {name} --stage prepare`")
    if not in_place and migration.stage == "prepare":
        raise PreconditionFailed(f"{name} has no shadow to send queries to: `migrator rollout {name} --stage backfill`")
    if migration.stage not in (("prepare", "canary") if in_place else ("backfill", "canary")):
        mixed = "new vectors may be in the collection, which old queries cannot search; " if in_place else ""
        raise PreconditionFailed(
            f"{name} is at stage {migration.stage}: {mixed}to take queries back use `migrator rollback {name}`"
        )
    route = _route(project, migration)
    ladder = project.settings.rollout.canary
    higher = [rung for rung in ladder if rung > route.canary_percent]
    if options.percent is None:
        if not higher:
            following = "backfill" if in_place else "cutover"
            raise PreconditionFailed(f"{name} is at 100 %: next is `migrator rollout {name} --stage {following}`")
        percent = higher[0]
    else:
        percent = options.percent
        if percent and percent not in ladder:
            raise UsageProblem(f"--percent {percent} is not one of rollout.canary {ladder} (or 0)")
        if higher and percent > higher[0]:
            raise PreconditionFailed(
                f"{name} is at {route.canary_percent:g} %: the next step is {higher[0]} %, not {percent} %"
            )
    with project.store() as store:
        plan = check_fresh(project, store)
        _check_encoders(project, store)
    if percent > route.canary_percent:  # the way back is never barred
        check_verified(project, migration, plan)
        if not in_place:
            _check_backfilled(project, migration, options)

    def make() -> str:
        if not in_place and percent > route.canary_percent:
            _check_what_was_written(project, migration)
        if not in_place and migration.stage == "backfill":
            shadow.publish(project, migration)
        _move_route(
            project, migration, route, stage="canary", phase="canary", detail={"percent": percent},
            canary_encoder=migration.new_encoder_id,
            canary_collection=migration.source if in_place else migration.shadow,
            canary_percent=float(percent),
            write_encoders=[migration.old_encoder_id, *([] if in_place else [migration.new_encoder_id])],
        )  # fmt: skip
        moved = f"{percent} % of the queries now use the new encoder"
        if in_place:
            return f"{moved}; stored vectors are untouched"
        return f"{moved} and {migration.shadow}; applications now write to both collections (`migrator route {name}`)"

    return Step(f"move the new encoder's share of the queries from {route.canary_percent:g} % to {percent} %", make)


def _backfill(project: Project, migration: Migration, options: Options) -> Step:
    name = project.name
    if migration.stage == "backfill":
        raise PreconditionFailed(f"{name}: the backfill stage is open: run `migrator backfill {name}`")
    in_place = migration.strategy == "in_place"
    if migration.stage not in (("prepare", "canary") if in_place else ("prepare",)):
        raise PreconditionFailed(
            f"{name} is at stage {migration.stage}: `migrator status {name}` names the next command"
        )
    route = _route(project, migration)
    if in_place and route.canary_percent < 100:
        raise PreconditionFailed(
            f"{name}: {route.canary_percent:g} % of the queries use the new encoder, and the others cannot be compared "
            f"with new vectors: first `migrator rollout {name} --stage canary` up to 100 %"
        )
    with project.store() as store:
        plan = check_fresh(project, store)
        if not in_place:
            check_shadow(store, project.settings.new_encoder.dim)
        count = store.count()
        _check_encoders(project, store)
    check_verified(project, migration, plan)

    def make() -> str:
        if in_place:  # a client that still sends old queries would meet new vectors
            wait_for_clients(project, route.epoch, options.tell)
            write_alias.create(project, migration, options.tell)
        else:
            shadow.create(project, migration)
        try:
            _move_route(project, migration, route, stage="backfill", phase="backfill")
        except PreconditionFailed:
            if in_place:
                write_alias.delete(project, migration)
            else:
                shadow.discard_unused(project, migration)
            raise
        return f"{name} may be backfilled: run `migrator backfill {name}` until it says complete, or let cron do it"

    if in_place:
        return Step(f"open the backfill of {count} items; their old vectors go to the undo log", make)
    return Step(f"make {migration.shadow} and open the backfill of {count} items into it", make)


def _cutover(project: Project, migration: Migration, options: Options) -> Step:
    name = project.name
    before = "backfill" if migration.strategy == "in_place" else "canary"
    if migration.stage in ("cutover", "finalize"):
        raise PreconditionFailed(f"{name} has been cut over: next is `migrator rollout {name} --stage finalize`")
    if migration.stage != before:
        first = f"`migrator backfill {name}`" if before == "backfill" else "the canary"
        raise PreconditionFailed(f"{name} is at stage {migration.stage}: cutover comes after {first}")
    if migration.paused is not None:
        raise PreconditionFailed(
            f"{name} is paused ({migration.paused}): when that is settled, `migrator resume {name}`"
        )
    failures = _check_backfilled(project, migration, options)
    route = _route(project, migration)
    if migration.strategy == "in_place":
        return _cutover_in_place(project, migration, route, failures, options)
    return _cutover_shadow(project, migration, route, failures)


def _check_backfilled(project: Project, migration: Migration, options: Options) -> int:
    """Every chunk is done and no more items failed than are accepted; returns how many."""
    name = project.name
    counts = project.ledger.counts(migration.id)
    undone = sum(number for state, number in counts.by_state.items() if state != "done")
    if undone or not counts.passes:
        failed = counts.by_state.get("failed", 0)
        if failed:
            raise PreconditionFailed(
                f"{name}: {failed} chunks failed: `migrator failures {name}`, then --retry and backfill"
            )
        raise PreconditionFailed(f"{name}: {undone or 'all'} chunks are not done: `migrator backfill {name}`")
    if counts.open_failures > options.max_failures:
        raise PreconditionFailed(
            f"{name}: {counts.open_failures} items failed (`migrator failures {name}`): fix them and "
            f"`migrator failures {name} --retry`, or continue without them: --max-failures {counts.open_failures}"
        )
    return counts.open_failures


def _check_what_was_written(project: Project, migration: Migration) -> None:
    """Makes the health check that a backfill run still owes. Raises `PreconditionFailed` if it fails."""
    if not is_check_due(project, migration):
        return
    checked = catch_up_check(project, migration, project.new_encoder())
    if checked.pause is not None:
        raise PreconditionFailed(
            f"{project.name} is paused by the check of what the last backfill run wrote: {checked.pause}"
        )


def _cutover_in_place(project: Project, migration: Migration, route: Route, failures: int, options: Options) -> Step:
    name, stamp = project.name, migration.new_encoder_id
    assert stamp is not None
    with project.store() as store:
        check_fresh(project, store)
        _check_all_stamped(name, store.count(), store.count(stamp=stamp), failures)
        first = BEFORE_CUTOVER[store.capabilities.visible]

    def make() -> str:
        _check_what_was_written(project, migration)
        with project.store(write=True) as store:
            store.publish(final=True)
        # A fresh connection must find what was written, counted and sampled, before the route says so.
        with project.store() as store:
            total, stamped = store.count(), store.count(stamp=stamp)
            _check_all_stamped(name, total, stamped, failures)
            page = store.read(store.sample(READ_BACK, seed=route.epoch), vectors=True, payload=False)
            missing = sum(found != stamp for found in page.stamps)
            if missing > failures:
                raise PreconditionFailed(
                    f"{name}: {missing} of {len(page)} items read back carry no new stamp: backfill again"
                )
        _move_route(
            project, migration, route, stage="cutover", phase="new", all_done=True,
            detail={"items": total, "stamped": stamped, "failures_accepted": failures},
            query_encoder=stamp, canary_encoder=None, canary_collection=None, canary_percent=0.0,
            write_encoders=[stamp],
        )  # fmt: skip
        wait_for_clients(project, route.epoch + 1, options.tell)  # then the application may write: new vectors
        return f"{stamped} of {total} items carry the new encoder's vector; it is now the only encoder of the route"

    return Step(f"{first}make the new encoder the only one, for queries and for new items", make)


def _cutover_shadow(project: Project, migration: Migration, route: Route, failures: int) -> Step:
    name, beside = project.name, migration.shadow
    assert beside is not None
    if route.canary_percent < 100:
        raise PreconditionFailed(
            f"{name}: {route.canary_percent:g} % of the queries use {beside}: first "
            f"`migrator rollout {name} --stage canary` up to 100 %"
        )
    with project.store() as store:
        check_fresh(project, store)
    shadow.check_whole(project, migration)

    def make() -> str:
        _check_what_was_written(project, migration)
        shadow.publish(project, migration)
        items = shadow.check_whole(project, migration)
        shadow.point_alias(project, migration, beside)
        try:
            _move_route(
                project, migration, route, stage="cutover", phase="new", all_done=True,
                detail={"items": items, "failures_accepted": failures},
                query_encoder=migration.new_encoder_id, query_collection=beside,
                canary_encoder=None, canary_collection=None, canary_percent=0.0,
                write_encoders=[migration.new_encoder_id],
            )  # fmt: skip
        except PreconditionFailed:
            shadow.point_alias(project, migration, migration.source)
            raise
        alias = f", and alias {migration.alias} leads to it" if migration.alias else ""
        return f"{beside} with {items} items is now the only collection of the route{alias}; the old one is kept"

    return Step(f"put {beside} in the place of {migration.collection}, for queries and for new items", make)


def _check_all_stamped(name: str, total: int, stamped: int, failures: int) -> None:
    if total - stamped > failures:
        raise PreconditionFailed(
            f"{name}: {total - stamped - failures} of {total} items carry no vector of the new encoder "
            f"(they arrived or changed since): `migrator backfill {name}`"
        )


def _finalize(project: Project, migration: Migration, options: Options) -> Step:
    name = project.name
    if migration.stage != "cutover" and not (migration.state == "finished" and options.drop_old):
        if migration.state == "finished":
            kept = (
                "its old vectors are kept: --drop-old deletes them" if migration.old_kept else "nothing is left to do"
            )
            raise PreconditionFailed(f"{name} is finished; {kept}")
        raise PreconditionFailed(
            f"{name} is at stage {migration.stage}: finalize comes after `rollout --stage cutover`"
        )

    in_place = migration.strategy == "in_place"
    old = "the undo log" if in_place else f"the old collection {migration.collection}"
    configure = "old_encoder" if in_place or migration.alias else f"store to {migration.shadow} and old_encoder"

    def make() -> str:
        if in_place:
            write_alias.delete(project, migration)
        elif options.drop_old:
            shadow.drop_source(project, migration, options.tell)  # first: what the ledger calls gone must be gone
        project.ledger.move(
            migration, stage="finalize", state="finished",
            event="finalize", detail={"drop_old": options.drop_old}, old_kept=not options.drop_old,
        )  # fmt: skip
        if not options.drop_old:
            return f"{name} is finished; {old} is kept, `migrator rollback {name}` remains possible"
        if in_place:
            project.undo_log(migration).drop()
            with project.store(write=True) as store:
                store.clear_migration_state()
        else:
            project.copy_log(migration).drop()
        return f"{name} is finished; {old} is gone. Before the next migration set {configure} to what is served now"

    if options.drop_old:
        return Step(f"end the migration and delete {old}: there is no way back after that", make)
    return Step(f"end the migration; {old} is kept", make)


_STEPS: dict[str, Callable[[Project, Migration, Options], Step]] = {
    "prepare": _prepare,
    "canary": _canary,
    "backfill": _backfill,
    "cutover": _cutover,
    "finalize": _finalize,
}


def _route(project: Project, migration: Migration) -> Route:
    route = project.ledger.route(migration.collection)
    assert route is not None, "prepare writes the route in the same transaction as the stage"
    return route


def _move_route(
    project: Project,
    migration: Migration,
    route: Route,
    *,
    stage: Any,
    phase: str,
    detail: dict[str, Any] | None = None,
    all_done: bool = False,
    **columns: Any,
) -> None:
    project.ledger.move(
        migration, stage=stage, event=stage, detail=detail, all_done=all_done,
        route={"epoch": route.epoch, "phase": phase, **columns},
    )  # fmt: skip
