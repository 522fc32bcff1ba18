"""The transitions of a rollout, one per stage. Their order is in `migrator.lifecycle.strategy`.

In place, old queries must never meet new vectors, so the queries move first. A shadow is filled before it is searched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from migrator.adapters.base import Store
from migrator.errors import PreconditionFailed, UsageProblem
from migrator.evaluation.verdicts import losses
from migrator.ledger import Migration, Plan, Route
from migrator.lifecycle.collection import check_shadow, check_unmixed
from migrator.lifecycle.freshness import check_fresh
from migrator.lifecycle.strategy import STRATEGIES, Stage
from migrator.lifecycle.transitions import Transition
from migrator.lifecycle.validity import invalid_reason
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


def open_transition(project: Project, stage: Stage, options: Options) -> Transition:
    """The transition to `stage`, checked. Raises `PreconditionFailed` naming the command that comes first."""
    migration = project.migration()
    if migration.state == "rolling_back":
        raise PreconditionFailed(f"{project.name} is being rolled back: finish with `migrator rollback {project.name}`")
    if migration.state == "rolled_back":
        raise PreconditionFailed(f"{project.name} was rolled back: start again with `migrator plan {project.name}`")
    transition = TRANSITIONS[stage](project, migration, options)
    transition.check()
    return transition


class StageTransition(Transition):
    """A transition of one migration, with what its stages share."""

    def __init__(self, project: Project, migration: Migration, options: Options) -> None:
        self.project, self.migration, self.options = project, migration, options
        self.name = project.name
        self.strategy = STRATEGIES[migration.strategy]

    def notes(self) -> str:
        """The losses that the gate allows: said at every stage of a migration that makes search worse."""
        found = self.project.ledger.latest_verification(self.migration.id)
        return "" if found is None else "".join(f"; search {loss}" for loss in losses(found.results))

    def _move_route(
        self,
        route: Route,
        *,
        stage: Stage,
        phase: str,
        detail: dict[str, Any] | None = None,
        all_done: bool = False,
        **columns: Any,
    ) -> None:
        self.project.ledger.move(
            self.migration, stage=stage, event=stage, detail=detail, all_done=all_done,
            route={"epoch": route.epoch, "phase": phase, **columns},
        )  # fmt: skip


class Prepare(StageTransition):
    """Reserves the collection: from here on no other migration may touch it, and its route is in the ledger."""

    def check(self) -> None:
        """The collection is free, unmixed, and planned and verified as it is."""
        project, migration = self.project, self.migration
        if migration.state != "planned":
            raise PreconditionFailed(
                f"{self.name} is past prepare (stage {migration.stage}): `migrator status {self.name}`"
            )
        self._check_no_other_owner()
        with project.store() as store:
            plan = check_fresh(project, store)
            check_unmixed(project, store, *project.encoder_ids())
            self.second = shadow.shadow_name(migration) if self.strategy.second_collection else None
            if self.second is not None:
                check_shadow(store, project.settings.new_encoder.dim)
                if store.exists(self.second):
                    raise PreconditionFailed(
                        f"{self.second} is there already and not this migration's: remove it, or plan again"
                    )
            _check_encoders(project, store)
        check_verified(project, migration, plan)
        self.route = project.ledger.route(migration.collection)

    def _check_no_other_owner(self) -> None:
        collection, other = self.migration.collection, self.project.ledger.other_owner(self.migration)
        if other is None:
            return
        if other.state == "finished":
            raise PreconditionFailed(
                f"{other.name} still keeps old vectors of {collection}: give them up with "
                f"`migrator rollout {other.name} --stage finalize --drop-old`"
            )
        raise PreconditionFailed(f"{other.name} is active on {collection}: finish it or roll it back first")

    def describe(self) -> str:
        """The collection and its route."""
        return f"reserve {self.migration.collection} and write its route, with every query at the old encoder"

    def apply(self) -> str:
        """One transaction of the ledger."""
        migration, route = self.migration, self.route
        self.project.ledger.move(
            migration,
            stage="prepare",
            state="active",
            event="prepare",
            route=initial_route(
                migration,
                salt=secrets.token_hex(8),
                epoch=route.epoch if route else 0,
                ttl=self.project.settings.rollout.route_ttl,
            ),
            old_kept=True,
            shadow=self.second,
        )
        return f"{migration.collection} is reserved; every query goes to the old encoder {migration.old_encoder_id}"


class Canary(StageTransition):
    """Moves a share of the queries to the new encoder, one step of `rollout.canary` at a time, or back."""

    def check(self) -> None:
        """The stage is right, the step is the next one or lower, and the verification counts."""
        project, migration = self.project, self.migration
        self._check_stage()
        self.route = _route(project, migration)
        self.percent = self._percent()
        with project.store() as store:
            plan = check_fresh(project, store)
            _check_encoders(project, store)
        if self._moves_forward():  # the way back is never barred
            check_verified(project, migration, plan)
            if self.strategy.second_collection:
                _check_backfilled(project, migration, self.options)

    def _check_stage(self) -> None:
        name, stage, before = self.name, self.migration.stage, self.strategy.before("canary")
        if stage == "planned":
            raise PreconditionFailed(f"{name} is not prepared: `migrator rollout {name} --stage prepare`")
        if stage == "prepare" != before:
            raise PreconditionFailed(
                f"{name} has no shadow to send queries to: `migrator rollout {name} --stage backfill`"
            )
        if stage not in (before, "canary"):
            mixed = "new vectors may be in the collection, which old queries cannot search; "
            raise PreconditionFailed(
                f"{name} is at stage {stage}: {'' if self.strategy.second_collection else mixed}to take queries back "
                f"use `migrator rollback {name}`"
            )

    def _percent(self) -> int:
        """The share to move to: the next step, or `--percent`."""
        name, at, ladder = self.name, self.route.canary_percent, self.project.settings.rollout.canary
        higher = [step for step in ladder if step > at]
        percent = self.options.percent
        if percent is None:
            if not higher:
                following = self.strategy.after("canary")
                raise PreconditionFailed(f"{name} is at 100 %: next is `migrator rollout {name} --stage {following}`")
            return higher[0]
        if percent and percent not in ladder:
            raise UsageProblem(f"--percent {percent} is not one of rollout.canary {ladder} (or 0)")
        if higher and percent > higher[0]:
            raise PreconditionFailed(f"{name} is at {at:g} %: the next step is {higher[0]} %, not {percent} %")
        return percent

    def _moves_forward(self) -> bool:
        return self.percent > self.route.canary_percent

    def describe(self) -> str:
        """From which share to which."""
        at = f"{self.route.canary_percent:g}"
        return f"move the new encoder's share of the queries from {at} % to {self.percent} %"

    def apply(self) -> str:
        """Publishes a second collection first, so that no query meets an empty one."""
        project, migration, beside = self.project, self.migration, self.strategy.second_collection
        if beside and self._moves_forward():
            _check_what_was_written(project, migration)
        if beside and migration.stage == "backfill":
            shadow.publish(project, migration)
        self._move_route(
            self.route, stage="canary", phase="canary", detail={"percent": self.percent},
            canary_encoder=migration.new_encoder_id,
            canary_collection=migration.shadow if beside else migration.source,
            canary_percent=float(self.percent),
            write_encoders=[migration.old_encoder_id, *([migration.new_encoder_id] if beside else [])],
        )  # fmt: skip
        moved = f"{self.percent} % of the queries now use the new encoder"
        if beside:
            both = f"applications now write to both collections (`migrator route {self.name}`)"
            return f"{moved} and {migration.shadow}; {both}"
        return f"{moved}; stored vectors are untouched"


class Backfill(StageTransition):
    """Opens the stage in which `migrator backfill` works."""

    def check(self) -> None:
        """Where the queries move first, all of them have; the plan is fresh and the verification counts."""
        project, migration, name = self.project, self.migration, self.name
        if migration.stage == "backfill":
            raise PreconditionFailed(f"{name}: the backfill stage is open: run `migrator backfill {name}`")
        if migration.stage not in self.strategy.opens_from("backfill"):
            raise PreconditionFailed(
                f"{name} is at stage {migration.stage}: `migrator status {name}` names the next command"
            )
        self.route = _route(project, migration)
        if self.strategy.queries_first and self.route.canary_percent < 100:
            raise PreconditionFailed(
                f"{name}: {self.route.canary_percent:g} % of the queries use the new encoder, and the others cannot be "
                f"compared with new vectors: first `migrator rollout {name} --stage canary` up to 100 %"
            )
        with project.store() as store:
            plan = check_fresh(project, store)
            if self.strategy.second_collection:
                check_shadow(store, project.settings.new_encoder.dim)
            self.count = store.count()
            _check_encoders(project, store)
        check_verified(project, migration, plan)

    def describe(self) -> str:
        """How many items, and where the new vectors go."""
        if self.strategy.second_collection:
            return f"make {self.migration.shadow} and open the backfill of {self.count} items into it"
        return f"open the backfill of {self.count} items; their old vectors go to the undo log"

    def apply(self) -> str:
        """Prepares the store, then moves the route; undoes the former where the latter is refused."""
        project, migration, name = self.project, self.migration, self.name
        if self.strategy.second_collection:
            shadow.create(project, migration)
        else:  # a client that still sends old queries would meet new vectors
            wait_for_clients(project, self.route.epoch, self.options.tell)
            write_alias.create(project, migration, self.options.tell)
        try:
            self._move_route(self.route, stage="backfill", phase="backfill")
        except PreconditionFailed:
            if self.strategy.second_collection:
                shadow.discard_unused(project, migration)
            else:
                write_alias.delete(project, migration)
            raise
        return f"{name} may be backfilled: run `migrator backfill {name}` until it says complete, or let cron do it"


class Cutover(StageTransition):
    """Makes the new encoder the only one, once every item is proved to have its vector."""

    def check(self) -> None:
        """The stage before is over, nothing is paused, every chunk is done."""
        migration, name, before = self.migration, self.name, self.strategy.before("cutover")
        if migration.stage in ("cutover", "finalize"):
            raise PreconditionFailed(f"{name} has been cut over: next is `migrator rollout {name} --stage finalize`")
        if migration.stage != before:
            first = f"`migrator backfill {name}`" if before == "backfill" else "the canary"
            raise PreconditionFailed(f"{name} is at stage {migration.stage}: cutover comes after {first}")
        if migration.paused is not None:
            raise PreconditionFailed(
                f"{name} is paused ({migration.paused}): when that is settled, `migrator resume {name}`"
            )
        self.failures = _check_backfilled(self.project, migration, self.options)
        self.route = _route(self.project, migration)


class CutoverInPlace(Cutover):
    """The cutover of a collection whose vectors were replaced."""

    def check(self) -> None:
        """Every item carries the new encoder's stamp."""
        super().check()
        assert self.migration.new_encoder_id is not None
        self.stamp = self.migration.new_encoder_id
        with self.project.store() as store:
            check_fresh(self.project, store)
            _check_all_stamped(self.name, store.count(), store.count(stamp=self.stamp), self.failures)
            self.first = BEFORE_CUTOVER[store.capabilities.visible]

    def describe(self) -> str:
        """What is published, and that the old encoder is out of use."""
        return f"{self.first}make the new encoder the only one, for queries and for new items"

    def apply(self) -> str:
        """Publishes, counts and reads back over a new connection, then moves the route."""
        _check_what_was_written(self.project, self.migration)
        with self.project.store(write=True) as store:
            store.publish(final=True)
        total, stamped = self._check_over_new_connection()
        self._move_route(
            self.route, stage="cutover", phase="new", all_done=True,
            detail={"items": total, "stamped": stamped, "failures_accepted": self.failures},
            query_encoder=self.stamp, canary_encoder=None, canary_collection=None, canary_percent=0.0,
            write_encoders=[self.stamp],
        )  # fmt: skip
        # then the application may write: new vectors
        wait_for_clients(self.project, self.route.epoch + 1, self.options.tell)
        return f"{stamped} of {total} items carry the new encoder's vector; it is now the only encoder of the route"

    def _check_over_new_connection(self) -> tuple[int, int]:
        """A fresh connection must find what was written, counted and sampled, before the route says so."""
        with self.project.store() as store:
            total, stamped = store.count(), store.count(stamp=self.stamp)
            _check_all_stamped(self.name, total, stamped, self.failures)
            page = store.read_vectors(store.sample(READ_BACK, seed=self.route.epoch))
        missing = sum(found != self.stamp for found in page.stamps)
        if missing > self.failures:
            raise PreconditionFailed(
                f"{self.name}: {missing} of {len(page)} items read back carry no new stamp: backfill again"
            )
        return total, stamped


class CutoverToSecond(Cutover):
    """The cutover to the collection that was filled beside the old one."""

    def check(self) -> None:
        """Every query is there already, and both collections hold the same items."""
        super().check()
        project, migration, name = self.project, self.migration, self.name
        assert migration.shadow is not None
        self.second = migration.shadow
        if self.route.canary_percent < 100:
            raise PreconditionFailed(
                f"{name}: {self.route.canary_percent:g} % of the queries use {self.second}: first "
                f"`migrator rollout {name} --stage canary` up to 100 %"
            )
        with project.store() as store:
            check_fresh(project, store)
        shadow.check_whole(project, migration)

    def describe(self) -> str:
        """Which collection replaces which."""
        return f"put {self.second} in the place of {self.migration.collection}, for queries and for new items"

    def apply(self) -> str:
        """Publishes, compares again, moves the alias, then the route; the alias back where the latter is refused."""
        project, migration = self.project, self.migration
        _check_what_was_written(project, migration)
        shadow.publish(project, migration)
        items = shadow.check_whole(project, migration)
        shadow.point_alias(project, migration, self.second)
        try:
            self._move_route(
                self.route, stage="cutover", phase="new", all_done=True,
                detail={"items": items, "failures_accepted": self.failures},
                query_encoder=migration.new_encoder_id, query_collection=self.second,
                canary_encoder=None, canary_collection=None, canary_percent=0.0,
                write_encoders=[migration.new_encoder_id],
            )  # fmt: skip
        except PreconditionFailed:
            shadow.point_alias(project, migration, migration.source)
            raise
        alias = f", and alias {migration.alias} leads to it" if migration.alias else ""
        return f"{self.second} with {items} items is now the only collection of the route{alias}; the old one is kept"


class Finalize(StageTransition):
    """Ends the migration; with `--drop-old` what is old is deleted."""

    def check(self) -> None:
        """The cutover is done; or the migration is finished, and what it kept is to be deleted now."""
        migration, name = self.migration, self.name
        drop_later = migration.state == "finished" and self.options.drop_old
        if migration.stage == "cutover" or drop_later:
            return
        if migration.state != "finished":
            raise PreconditionFailed(
                f"{name} is at stage {migration.stage}: finalize comes after `rollout --stage cutover`"
            )
        kept = "its old vectors are kept: --drop-old deletes them" if migration.old_kept else "nothing is left to do"
        raise PreconditionFailed(f"{name} is finished; {kept}")

    def _old(self) -> str:
        return f"the old collection {self.migration.collection}" if self.strategy.second_collection else "the undo log"

    def describe(self) -> str:
        """What is deleted, if anything."""
        if self.options.drop_old:
            return f"end the migration and delete {self._old()}: there is no way back after that"
        return f"end the migration; {self._old()} is kept"

    def apply(self) -> str:
        """Deletes an old collection before the ledger says so, and logs afterwards: a killed call can be repeated."""
        project, migration, beside = self.project, self.migration, self.strategy.second_collection
        drop_old = self.options.drop_old
        if not beside:
            write_alias.delete(project, migration)
        elif drop_old:
            shadow.drop_source(project, migration, self.options.tell)
        project.ledger.move(
            migration, stage="finalize", state="finished",
            event="finalize", detail={"drop_old": drop_old}, old_kept=not drop_old,
        )  # fmt: skip
        if not drop_old:
            return f"{self.name} is finished; {self._old()} is kept, `migrator rollback {self.name}` remains possible"
        if beside:
            project.copy_log(migration).drop()
        else:
            project.undo_log(migration).drop()
            with project.store(write=True) as store:
                store.clear_migration_state()
        configure = f"store to {migration.shadow} and old_encoder" if beside and not migration.alias else "old_encoder"
        gone = f"{self.name} is finished; {self._old()} is gone"
        return f"{gone}. Before the next migration set {configure} to what is served now"


def _cutover(project: Project, migration: Migration, options: Options) -> Cutover:
    kind = CutoverToSecond if STRATEGIES[migration.strategy].second_collection else CutoverInPlace
    return kind(project, migration, options)


TRANSITIONS: Mapping[Stage, Callable[[Project, Migration, Options], StageTransition]] = MappingProxyType(
    {"prepare": Prepare, "canary": Canary, "backfill": Backfill, "cutover": _cutover, "finalize": Finalize}
)
"""What `rollout --stage` does, by stage."""


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


def _check_all_stamped(name: str, total: int, stamped: int, failures: int) -> None:
    if total - stamped > failures:
        raise PreconditionFailed(
            f"{name}: {total - stamped - failures} of {total} items carry no vector of the new encoder "
            f"(they arrived or changed since): `migrator backfill {name}`"
        )


def _route(project: Project, migration: Migration) -> Route:
    route = project.ledger.route(migration.collection)
    assert route is not None, "prepare writes the route in the same transaction as the stage"
    return route
