"""Taking an in-place migration back: every old vector is restored before the route returns to the old encoder.

Where a vector comes from, when item and undo log are compared again after a crash or an edit:

- it carries the new stamp: the backfill wrote it, so the undo log's vector goes back;
- it carries no stamp and equals the undo log's vector: it is restored already;
- anything else was written by the application. Before the cutover that was done with the old encoder, and the
  vector stays; from the cutover on with the new one, and the image is embedded again with the old encoder.

Without an old model the last cannot be done. Then the undo log's vector goes back, for a vector of an earlier image is
found by old queries and a new encoder's is not; an item that the undo log does not know keeps what it has.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from migrator.adapters.base import ItemId, Store, Vectors, order_key
from migrator.embedding.embed import embed, locate
from migrator.errors import PreconditionFailed
from migrator.ledger import Chunk, Migration
from migrator.project import Project

if TYPE_CHECKING:
    from migrator.trainer.encoders.encoder import Encoder

PAGE = 5_000
NO_MODEL = "old_encoder is stored, there is no model; it keeps the new encoder's vector"


class Restore:
    """The way back of one collection."""

    def __init__(
        self, project: Project, migration: Migration, store: Store, report: Callable[[int, int], None]
    ) -> None:
        assert migration.new_encoder_id is not None
        self.project, self.migration, self.store, self.report = project, migration, store, report
        self.stamp = migration.new_encoder_id
        self.undo = project.undo_log(migration)
        self.after_cutover = migration.stage in ("cutover", "finalize")
        self.restored = self.re_encoded = 0
        self.problems: dict[ItemId, str] = {}
        self.stale: list[ItemId] = []
        self._old_encoder: Encoder | None = None

    def run(self) -> None:
        """Chunk by chunk, the latest pass first: the first vector put back for an item is the one that counts."""
        chunks = self.project.ledger.chunks(self.migration.id)
        failed = self.project.open_failures(self.migration)
        handled: set[ItemId] = set()  # of the catch-up passes, which are small
        listed: set[ItemId] = set()  # of the chunks that are lists: all ids of the collection, as it was cut
        for number, chunk in enumerate(sorted(chunks, key=lambda chunk: (-chunk.pass_number, chunk.ordinal))):
            ids = self.project.ledger.ids_of(chunk) if self.after_cutover else None
            listed.update(ids or ())
            touched = self._restore_chunk(chunk, ids, handled, failed)
            if chunk.pass_number > 0:
                handled |= touched
            self.report(number + 1, len(chunks))
        if self.after_cutover:
            last = max((json.loads(chunk.upto_id) for chunk in chunks if chunk.pass_number == 0), key=order_key)
            left_alone = handled | failed
            # Ranges leave only what lies beyond the last of them, lists whatever is in none of them.
            others = self._unstamped(None if listed else last, None)
            self._re_encode(item for item in others if item not in left_alone and item not in listed)
        if self.store.count(stamp=self.stamp):
            self._re_encode(self._stamped())
        self.store.publish(final=True)
        left = self.store.count(stamp=self.stamp) - len(self.problems)
        if left > 0:
            raise PreconditionFailed(
                f"{left} items still carry the new encoder's stamp: again `migrator rollback {self.project.name}`"
            )
        self.store.clear_migration_state()

    def _restore_chunk(
        self, chunk: Chunk, ids: list[ItemId] | None, handled: set[ItemId], failed: set[ItemId]
    ) -> set[ItemId]:
        old = self.undo.read(chunk)
        known = set() if old is None else set(old.ids)
        if chunk.state == "restored":
            return known
        if old is None and chunk.written:
            raise PreconditionFailed(
                f"the undo log of chunk {chunk.pass_number}/{chunk.ordinal} is not in {self.undo.folder}: restore this "
                f"folder from a backup, then again `migrator rollback {self.project.name}`"
            )
        foreign: list[ItemId] = []
        if old is not None:
            rows = {item: row for row, item in enumerate(old.ids)}
            now = self.store.read_vectors([item for item in old.ids if item not in handled])
            back: dict[str | None, list[int]] = {}
            for item, vector, stamp in zip(now.ids, now.vectors, now.stamps, strict=True):
                row = rows[item]
                if stamp is not None and stamp.startswith(self.stamp):  # an adapter's write intent too
                    back.setdefault(old.stamps[row], []).append(row)
                elif self.after_cutover and vector.tobytes() != old.vectors[row].tobytes():
                    if self.project.old_is_stored:
                        back.setdefault(old.stamps[row], []).append(row)
                        self.stale.append(item)
                    else:
                        foreign.append(item)
            for stamp, these in back.items():
                self._write([old.ids[row] for row in these], old.vectors[these], stamp)
                self.restored += len(these)
        if self.after_cutover and chunk.pass_number == 0:
            left_alone = known | handled | failed
            if ids is None:
                start = None if chunk.after_id is None else json.loads(chunk.after_id)
                arrived = self._unstamped(start, json.loads(chunk.upto_id))
                foreign += [item for item in arrived if item not in left_alone]
            else:  # deleted before the backfill came to them, and there again
                foreign += self._without_stamp([item for item in ids if item not in left_alone])
        self._re_encode(foreign)
        self.project.ledger.set_restored(chunk)
        return known

    def _write(self, ids: list[ItemId], vectors: Vectors, stamp: str | None) -> None:
        report = self.store.write_vectors(ids, vectors, stamp)
        self.problems.update({item: f"the store refused it: {why}" for item, why in report.rejected.items()})

    def _unstamped(self, after: ItemId | None, up_to: ItemId | None) -> Iterator[ItemId]:
        while ids := self.store.unstamped(self.stamp, after=after, limit=PAGE):
            for item in ids:
                if up_to is not None and order_key(item) > order_key(up_to):
                    return
                yield item
            after = ids[-1]

    def _without_stamp(self, ids: list[ItemId]) -> list[ItemId]:
        page = self.store.read_stamps(ids)
        return [item for item, stamp in zip(page.ids, page.stamps, strict=True) if stamp != self.stamp]

    def _stamped(self) -> Iterator[ItemId]:
        after: ItemId | None = None
        while ids := self.store.scan_ids(after=after, limit=PAGE):
            page = self.store.read_stamps(ids)
            yield from (item for item, stamp in zip(page.ids, page.stamps, strict=True) if stamp == self.stamp)
            after = ids[-1]

    def _re_encode(self, items: Iterable[ItemId]) -> None:
        """Embeds items that the application wrote with the new encoder, with the old one."""
        if self.project.old_is_stored:
            self.problems.update(dict.fromkeys(items, NO_MODEL))
            return
        remaining = iter(items)
        while ids := list(itertools.islice(remaining, PAGE)):
            if self._old_encoder is None:
                self._old_encoder = self.project.old_encoder()
            page = self.store.read_payloads(ids)
            images = self.project.images()
            embedded = embed(
                images,
                locate(images, zip(page.ids, page.payloads, strict=True)),
                [self._old_encoder],
                **self.project.loading(),
            )
            self.problems.update({page.ids[row]: why for row, why in embedded.problems.items()})
            if len(embedded.rows):
                self._write([page.ids[row] for row in embedded.rows], embedded.vectors[0], None)
                self.re_encoded += len(embedded.rows)
