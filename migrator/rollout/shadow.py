"""The second collection of the shadow strategy: made, proved whole, put in the first one's place, and taken back.

Nothing is dropped but the shadow, which migrator made under a name of its own, and at `finalize --drop-old` the old
collection that this flag names; and neither while an alias leads to it. A rollback also keeps a shadow that alone holds
items: where there is no old model, or where the old collection takes them no more.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from migrator.adapters.base import ItemId, Page, Store, StoreError, StoreRejected, same_value
from migrator.adapters.iterate import ITEMS, iter_ids, read_whole, whole_pages
from migrator.artifacts.copy_log import Copies, digests, further_digest
from migrator.backfill.transfer import Shadow, open_transfer
from migrator.embedding.embed import embed, locate
from migrator.errors import PreconditionFailed
from migrator.ledger import Migration, Route
from migrator.project import Project
from migrator.rollout.clients import Tell, wait_for_clients
from migrator.route import initial_route

if TYPE_CHECKING:
    from migrator.trainer.encoders.encoder import Encoder

NO_MODEL = "old_encoder is stored, there is no model; it lies in the shadow alone"
NAMED = 3
"""Items that a message names."""


def shadow_name(migration: Migration) -> str:
    """What the shadow of a migration is called; no other collection bears this name by chance."""
    return f"{migration.source}__{hashlib.sha256(migration.key.encode()).hexdigest()[:8]}"


def create(project: Project, migration: Migration) -> None:
    """Makes the shadow. One that a killed call has made is taken over; a refused call leaves none behind."""
    assert migration.shadow is not None
    with project.store(write=True) as source:
        made = not source.exists(migration.shadow)
        try:
            source.create_like(migration.shadow, dim=project.settings.new_encoder.dim).close()
        except StoreRejected:
            if made:
                with suppress(StoreError):  # what the store refused is the message, whatever becomes of the rest
                    _drop_empty(source, migration.shadow)
            raise


def discard_unused(project: Project, migration: Migration) -> None:
    """Drops the shadow again where nothing came of the stage that it was made for."""
    assert migration.shadow is not None
    if project.migration().stage == "prepare":
        with project.store(write=True) as source:
            _drop_empty(source, migration.shadow)


def _drop_empty(source: Store, collection_id: str) -> None:
    if source.exists(collection_id):
        with closing(source.open_collection(collection_id)) as shadow:
            if shadow.count() == 0:
                shadow.drop()


def check_whole(project: Project, migration: Migration) -> int:
    """The number of items in the shadow, if every one of the source is there as it is now; else refused.

    Items with an open failure do not count.
    """
    leave = project.open_failures(migration)
    with open_transfer(project, migration) as transfer:
        assert isinstance(transfer, Shadow)
        missing = list(itertools.islice(transfer.outstanding(leave), NAMED + 1))
        if missing:
            raise PreconditionFailed(
                f"{project.name}: {', '.join(repr(item) for item in missing[:NAMED])}"
                f"{' and more' if len(missing) > NAMED else ''} arrived, changed or went since they were copied: "
                f"`migrator backfill {project.name}`"
            )
        return transfer.target.count()


def publish(project: Project, migration: Migration) -> None:
    """Lets the shadow answer queries, as whole as it is."""
    with open_transfer(project, migration) as transfer:
        assert isinstance(transfer, Shadow)
        transfer.target.publish(final=True)


def point_alias(project: Project, migration: Migration, to: str) -> None:
    """Moves the alias, where the collection is addressed by one."""
    if migration.alias is None:
        return
    with project.store(write=True) as store:
        store.swap_alias(migration.alias, to=to)


def drop_source(project: Project, migration: Migration, tell: Tell) -> None:
    """Deletes the old collection once no client can search it.

    Raises `PreconditionFailed` while an alias leads to it. May be repeated.
    """
    route = project.ledger.route(migration.collection)
    assert route is not None
    wait_for_clients(project, route.epoch, tell)
    with project.store(write=True) as store:
        if store.describe().collection_id == migration.source:
            store.drop()
        elif store.exists(migration.source):
            with closing(store.open_collection(migration.source)) as source:
                source.drop()


@dataclass(slots=True)
class TakenBack:
    """What a rollback brought from the shadow into the old collection."""

    re_encoded: int = 0
    """Items that the application wrote after the cutover, embedded again with the old encoder."""
    removed: int = 0
    """Items that it deleted after the cutover."""
    problems: dict[ItemId, str] = field(default_factory=dict)
    """Items that could not be embedded again, with the reason: the old collection has their state before."""
    stale: set[ItemId] = field(default_factory=set)
    """Items that were brought back with the old vector that the old collection has, as there is no old model."""
    refused: set[ItemId] = field(default_factory=set)
    """Items of which the old collection did not take what the shadow has, with the reason among the problems."""
    kept: str | None = None
    """The shadow, where it alone holds items, or their newest state, that cannot be brought back."""
    synced: dict[ItemId, int] = field(default_factory=dict)
    """Items already brought back, with the digest that they had in the shadow then."""


def take_back(
    project: Project, migration: Migration, report: Callable[[int, int], None], tell: Tell = lambda _: None
) -> TakenBack:
    """Everything after the state was set to `rolling_back`, but for the last move. May be repeated."""
    assert migration.shadow is not None
    result = TakenBack()
    route = project.ledger.route(migration.collection)
    assert route is not None
    served = route.query_collection == migration.shadow
    if served:
        # The application keeps both collections up from here on, and searches the shadow until the old one is ready.
        route = _dual_writes(project, migration, route)
        _back_sync(project, migration, result, report)
    point_alias(project, migration, migration.source)
    project.ledger.move(
        migration, event="route is back", route=initial_route(migration, salt=route.salt, epoch=route.epoch)
    )
    if migration.stage in ("canary", "cutover", "finalize"):  # before, no route has named the shadow
        wait_for_clients(project, route.epoch + 1, tell)
    if migration.stage in ("cutover", "finalize"):
        _back_sync(project, migration, result, report)  # what applications wrote that did not know it yet
    with project.store(write=True) as source:
        if result.refused or (project.old_is_stored and _any_missing(source, list(result.problems))):
            result.kept = migration.shadow
        elif source.exists(migration.shadow):
            with closing(source.open_collection(migration.shadow)) as target:
                target.drop()
    return result


def _any_missing(store: Store, items: Sequence[ItemId]) -> bool:
    """Whether one of these items is not there; the application may have brought some back itself."""
    parts = (items[start : start + ITEMS] for start in range(0, len(items), ITEMS))
    return any(len(store.read_stamps(part)) < len(part) for part in parts)


def _dual_writes(project: Project, migration: Migration, route: Route) -> Route:
    project.ledger.move(
        migration,
        event="dual writes",
        route={
            "epoch": route.epoch,
            "phase": "rolling_back",
            "canary_encoder": migration.old_encoder_id,
            "canary_collection": migration.source,
            "canary_percent": 0.0,
            "write_encoders": [migration.new_encoder_id, migration.old_encoder_id],
        },
    )
    fresh = project.ledger.route(migration.collection)
    assert fresh is not None
    return fresh


def _back_sync(project: Project, migration: Migration, result: TakenBack, report: Callable[[int, int], None]) -> None:
    """Brings what changed in the shadow since it was copied into the source."""
    assert migration.shadow is not None
    with project.store() as source:
        if not source.exists(migration.shadow):
            return  # an earlier, killed call has come as far as dropping it
    with open_transfer(project, migration) as transfer:
        assert isinstance(transfer, Shadow)
        back = _BackSync(project, transfer, result)
        total = transfer.target.count()
        done = 0
        for lower, higher, copies in transfer.stretches():
            done += back.stretch(lower, higher, copies)
            report(min(done, total), total)
        transfer.source.publish(final=True)


class _BackSync:
    def __init__(self, project: Project, transfer: Shadow, result: TakenBack) -> None:
        self.project, self.source, self.target, self.result = project, transfer.source, transfer.target, result
        self._old: Encoder | None = None

    def stretch(self, lower: ItemId | None, higher: ItemId | None, copies: Copies) -> int:
        """One piece of the collection; returns how many items of the shadow lie in it."""
        can = self.target.capabilities
        there: set[ItemId] = set()
        for page in whole_pages(self.target, lower, higher):
            there.update(page.ids)
            now = digests(page, can)
            changed = [
                row
                for row, (item, digest) in enumerate(zip(page.ids, now, strict=True))
                if digest not in (self.result.synced.get(item), copies[item].shadow if item in copies else None)
            ]
            self._re_encode(page, changed)
            self.result.synced.update({page.ids[row]: now[row] for row in changed})
        deleted = [item for item in iter_ids(self.source, lower, higher) if item in copies and item not in there]
        if deleted:
            self.source.delete(deleted)
            self.result.removed += len(deleted)
        return len(there)

    def _re_encode(self, page: Page, rows: list[int]) -> None:
        if not rows:
            return
        ids, payloads = [page.ids[row] for row in rows], [page.payloads[row] for row in rows]
        further = None if page.further is None else [page.further[row] for row in rows]
        if self.project.old_is_stored:
            self._bring_payloads(Page(ids, page.vectors[rows], payloads, [None] * len(ids), further))
            return
        if self._old is None:
            self._old = self.project.old_encoder()
        images = self.project.images()
        paths = locate(images, zip(ids, payloads, strict=True))
        embedded = embed(images, paths, [self._old], **self.project.loading())
        self.result.problems.update({ids[row]: why for row, why in embedded.problems.items()})
        good = embedded.rows.tolist()
        if good:
            self.result.re_encoded += self._insert(
                Page(
                    [ids[row] for row in good],
                    embedded.vectors[0],
                    [payloads[row] for row in good],
                    [None] * len(good),
                    None if further is None else [further[row] for row in good],
                )
            )

    def _insert(self, items: Page) -> int:
        """How many of the items the source has taken; the others are problems."""
        report = self.source.insert(items)
        self.result.problems.update({item: f"the store refused it: {why}" for item, why in report.rejected.items()})
        self.result.refused.update(report.rejected)
        return len(report.written)

    def _bring_payloads(self, page: Page) -> None:
        """Without an old model: items keep the old vector that the source has, those it has none of are named."""
        place = {item: row for row, item in enumerate(page.ids)}
        there = read_whole(self.source, page.ids)
        rows = [row for row, item in enumerate(there.ids) if not _same_beside_vector(there, row, page, place[item])]
        if rows:
            items = [there.ids[row] for row in rows]
            self._insert(
                Page(
                    items,
                    there.vectors[rows],
                    [page.payloads[place[item]] for item in items],
                    [None] * len(rows),
                    None if page.further is None else [page.further[place[item]] for item in items],
                )
            )
        self.result.stale.update(there.ids)
        self.result.problems.update(dict.fromkeys(set(page.ids) - set(there.ids), NO_MODEL))


def _same_beside_vector(one: Page, row: int, other: Page, place: int) -> bool:
    """Whether two items have the same payload and the same further vectors."""
    if not same_value(one.payloads[row], other.payloads[place]):
        return False
    return (
        one.further is None
        or other.further is None
        or further_digest(one.further[row]) == further_digest(other.further[place])
    )
