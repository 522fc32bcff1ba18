"""Milvus: a server over gRPC, or Milvus Lite, a local file that one process at a time may open.

Reads come in two kinds, for on a server a page in the order of the keys (`iterator`) is served from whatever is there,
however strong a consistency is asked for. So a strong query goes before such pages, and items are read by key, which
is strong by itself.

Where the server can change single fields, that is used. But then an application's write need not replace the whole
row either (in Milvus Lite no upsert does), and a stamp may outlive the vector that it was written with. So there a
stamp carries the checksum of its vector and holds as long as that fits. Elsewhere whole rows are rewritten, with
the row as it was right before, and an application's write removes the stamp.

What is known of a Milvus Lite without asking it again is in `migrator.adapters.milvus.lite`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from migrator.adapters.base import (
    Fence,
    ItemId,
    Page,
    StoreRejected,
    Vectors,
    WriteReport,
    same_value,
)
from migrator.adapters.iterate import parts, write_halving
from migrator.adapters.milvus import collection as like
from migrator.adapters.milvus.collection import Description
from migrator.adapters.milvus.connection import KEEP_KEYS, Connection, NoCollection, Row
from migrator.adapters.milvus.reader import (
    LITE_PAGE,
    LITE_VERSION,
    LOADING,
    PARTITION,
    STAMP,
    MilvusReader,
    plain_value,
)
from migrator.adapters.vectors import Contents, as_batch, contents, unusable

KEYS = ("kind", "uri", "token", "database", "collection", "vector", "timeout", "auto_id_in_shadow")
WHOLE_ROWS = 5_000  # read and rewritten at once: fewer take longer, more leave others more time in between


def open_store(config: Mapping[str, Any], *, write: bool) -> MilvusStore:
    """Opens `config["collection"]`, a name or an alias, at `uri`: a server, or a file of Milvus Lite.

    Raises `StoreRejected` for what is not there or cannot be migrated, `StoreUnavailable` if the server does not
    answer, `StoreBusy` if another process has the file.
    """
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        raise StoreRejected(f"a milvus store has no setting {unknown[0]!r}: known are {', '.join(KEYS[1:])}")
    for key in ("uri", "collection"):
        if not isinstance(config.get(key), str):
            raise StoreRejected(f"a milvus store needs `{key}`")
    if config.get("auto_id_in_shadow") not in (None, KEEP_KEYS):
        raise StoreRejected(f"`auto_id_in_shadow` of a milvus store is {KEEP_KEYS!r} or not there")
    connection = Connection(config)
    try:
        return MilvusStore(connection, config["collection"], vector=config.get("vector"), write=write)
    except BaseException:
        connection.release()
        raise


class MilvusStore(MilvusReader):
    """One collection of a Milvus."""

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Writes the vectors, as single fields or as whole rows, and reads them back afterwards."""
        self._must_write()
        if (refusal := self._in_place_refusal()) is not None:
            raise StoreRejected(f"collection {self._collection} {refusal}")
        batch = as_batch(vectors, self._dim, ids)
        rejected = {} if stamp is None else unusable(ids, batch)
        place = {item: row for row, item in enumerate(ids)}
        before = None if expected is None else contents(expected)
        written: list[ItemId] = []
        deleted: list[ItemId] = []
        changed: list[ItemId] = []
        for part in parts(ids, self._fitting if self._partial else min(self._fitting, WHOLE_ROWS)):
            with self._known.held() as known:
                rows, moved = self._as_they_are(part, before, known=known)
                deleted += [item for item in part if item not in rows]
                moved = [
                    item
                    for item in moved
                    # What bears our vector and stamp has been written by this very call, which is repeated.
                    if item not in rejected
                    and not (stamp is not None and self._is_written(rows[item], batch[place[item]], stamp))
                ]
                changed += moved
                leave = {*moved, *rejected}
                todo = [item for item in part if item in rows and item not in leave]
                new = [self._changed_row(rows[item], batch[place[item]], stamp) for item in todo]
                refused = self._upsert(new, partial=self._partial)
                rejected.update(refused)
                todo = [item for item in todo if item not in refused]
                if known and self._known.wrote(dict.fromkeys(todo, stamp)):
                    written += todo
                    continue
            after = self._rows(todo, [self._key, self._vector, *([STAMP] if self._dynamic else [])])
            for item in todo:
                row = after.get(item)
                if row is None:
                    deleted.append(item)
                elif self._is_written(row, batch[place[item]], stamp):
                    written.append(item)
                else:
                    changed.append(item)
        return WriteReport.of(written, deleted, rejected, changed)

    def _as_they_are(
        self, ids: list[ItemId], before: Mapping[ItemId, Contents] | None, *, known: bool
    ) -> tuple[dict[ItemId, Row], list[ItemId]]:
        """The rows of these keys that there are, and which of them are not what they were `before`."""
        if known and self._known.there(ids, with_contents=before is not None) and len(self._partitions()) == 1:
            rows: dict[ItemId, Row] = {item: {self._key: item} for item in ids}
            found: Mapping[ItemId, Contents] = self._known.rows
        else:
            # A single field is written without the rest of the row.
            rows = self._rows(ids, [self._key] if before is None and self._partial else ["*"])
            found = (
                {} if before is None else contents(self._reading(list(rows), rows, vectors=True, payload=True).page())
            )
        return rows, [item for item in rows if before is not None and not same_value(found[item], before.get(item))]

    def _is_written(self, row: Row, vector: Vectors, stamp: str | None) -> bool:
        if row.get(self._vector) is None:
            return False
        same = np.array_equal(np.asarray(row[self._vector], np.float32), vector, equal_nan=True)
        return same and (not self._dynamic or self._stamp_of(row) == stamp)

    def _changed_row(self, row: Row, vector: Vectors, stamp: str | None) -> Row:
        changed: Row = {self._key: row[self._key], self._vector: vector}
        if PARTITION in row:
            changed[PARTITION] = row[PARTITION]
        if not self._partial:
            kept = {name: value for name, value in row.items() if name != STAMP and name not in self._made}
            changed = {**{name: plain_value(value, self._fields.get(name)) for name, value in kept.items()}, **changed}
        if self._dynamic and (stamp is not None or self._partial):  # a single field is set to null, not removed
            changed[STAMP] = self._as_value(stamp, vector)
        return changed

    def _upsert(self, rows: list[Row], *, partial: bool) -> dict[ItemId, str]:
        more: Row = {"partial_update": True} if partial else {}
        return self._send("upsert", rows, **more)

    def _send(self, how: Literal["upsert", "insert"], rows: list[Row], **more: Any) -> dict[ItemId, str]:
        """Writes rows; those that are refused by themselves, with the reason."""
        refused: dict[ItemId, str] = {}
        by_partition: dict[str, list[Row]] = {}
        for row in rows:
            by_partition.setdefault(row.get(PARTITION, ""), []).append(row)
        for partition, some in by_partition.items():

            def write(batch: list[Row], partition: str = partition) -> None:
                stored = [{name: value for name, value in row.items() if name != PARTITION} for row in batch]
                self._may_change()
                self._call(how, self._written_name, stored, partition_name=partition, **more)

            refused.update(write_halving(some, write, lambda row: row[self._key], fatal=NoCollection))
        return refused

    def set_fence(self, fence: Fence | None) -> None:
        """Before each change, where it is a server's; a Milvus Lite file is locked."""
        self._fence = None if self._connection.lite else fence

    def create_write_alias(self, alias: str) -> None:
        """On a server; a Milvus Lite file is locked."""
        if not self._connection.lite and self._collection_of(alias) is None:
            self._call("create_alias", self._collection, alias)

    def delete_write_alias(self, alias: str) -> None:
        """On a server; a Milvus Lite file is locked."""
        if not self._connection.lite and self._collection_of(alias) == self._collection:
            self._call("drop_alias", alias)

    def write_through(self, alias: str) -> None:
        """Where the alias exists: a server may forbid it."""
        if not self._connection.lite and self._collection_of(alias) == self._collection:
            self._written_name = alias

    def _may_change(self) -> None:
        if self._fence is not None:
            self._fence(self._connection.timeout)

    def clear_migration_state(self) -> None:
        """Removes the stamps. Every row that carries one is rewritten for that."""
        self._must_write()
        if not self._dynamic:
            return
        # Milvus Lite keeps an emptied stamp as a field without a value, which `exists` does not find.
        carrying = "" if self._connection.lite else f"exists {STAMP}"
        after: ItemId | None = None
        while ids := self._key_list(carrying, after, None, LITE_PAGE):
            for part in parts(ids, self._fitting):
                if self._connection.lite:
                    self._remove_field(part)
                else:
                    page = self.read_vectors(part)
                    self.write_vectors(page.ids, page.vectors, None)
            after = ids[-1]

    def _remove_field(self, ids: list[ItemId]) -> None:
        """Replaces those rows of a Milvus Lite that have the field of the stamp by the same rows without it."""
        rows = [row for row in self._rows(ids, ["*"]).values() if STAMP in row]
        with self._known.held() as known:
            refused = self._write_whole([{name: row[name] for name in row if name != STAMP} for row in rows])
            if known:
                self._known.inserted({row[self._key]: None for row in rows if row[self._key] not in refused})

    # -- a second collection ----------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether there is a collection of that name."""
        return collection_id in self._call("list_collections")

    def open_collection(self, collection_id: str) -> MilvusStore:
        """Another collection over the same connection."""
        if not self.exists(collection_id):
            raise StoreRejected(f"{self._connection.where} has no collection {collection_id!r}")
        connection = self._connection.shared()
        try:
            return MilvusStore(connection, collection_id, vector=self._vector, write=self._write)
        except BaseException:
            connection.release()
            raise

    def create_like(self, collection_id: str, *, dim: int) -> MilvusStore:
        """An empty collection with the same fields, properties and indexes, for vectors of `dim`, loaded.

        What comes of it is compared with this one, field by field; whatever differs but `dim` is a refusal, and what
        this call has made is then removed.
        """
        self._must_write()
        want = self._wanted(dim)
        made = not self.exists(collection_id)
        try:
            if made:
                like.create(self._call, collection_id, want)
            else:  # by a call that was killed: its own work is completed, what is not its own is left as it is
                self._must_fit(collection_id, dim)
            like.complete(self._call, collection_id, want)
            self._must_be(collection_id, want)
            self._load(collection_id)
            return self.open_collection(collection_id)
        except StoreRejected:
            if made:
                like.drop(self._call, collection_id)
            raise

    def _load(self, collection_id: str) -> None:
        replicas = self._replicas()
        try:
            self._call("load_collection", collection_id, timeout=LOADING, **replicas)
        except StoreRejected as refusal:
            number = replicas.get("replica_number", 1)
            raise StoreRejected(
                f"there is no room to load a second collection like {self._collection}, with {number} replicas: "
                f"{refusal}: give the server more query nodes, then try again"
            ) from refusal

    def _must_fit(self, collection_id: str, dim: int) -> None:
        fields = self._describe(collection_id)["fields"]
        found = next((field["params"].get("dim") for field in fields if field["name"] == self._vector), None)
        if found != dim:
            raise StoreRejected(
                f"{collection_id} exists already, with {found}-d vectors instead of {dim}-d ones: remove it"
            )

    def _must_be(self, collection_id: str, want: Description) -> None:
        found = like.describe(self._call, collection_id)
        wrong = like.difference(want, found)
        if wrong is not None:
            raise StoreRejected(
                f"{self._connection.where} does not make another collection like {self._collection}: {wrong}: "
                "set rollout.strategy to in_place, or change that in the collection"
            )

    def check_create_like(self, *, dim: int) -> None:
        """Makes such a collection under a scratch name, compares it, and drops it."""
        want = self._wanted(dim)
        with like.scratch(self._call, want) as name:
            like.complete(self._call, name, want)
            self._must_be(name, want)

    def _wanted(self, dim: int) -> Description:
        """What a shadow is to be. Refuses what cannot be carried over."""
        source = self._description()
        if not self._auto_id:
            return like.wanted(source, vector=self._vector, dim=dim)
        if self._connection.keep_keys:
            return like.wanted(source, vector=self._vector, dim=dim, own_keys=False)
        if self._given_keys.carried:
            return like.wanted(source, vector=self._vector, dim=dim)
        if self._given_keys.written_by is None and self._try_given_keys(property_=True).carried:
            return like.wanted(source, vector=self._vector, dim=dim, given_keys=True)
        why = (
            "this server takes no rows with given keys"
            if self._given_keys.written_by is None
            else "in a copy this server would make keys that are there already"
        )
        in_place = "" if self._in_place_refusal() or dim != self._dim else "set rollout.strategy to in_place, or "
        raise StoreRejected(
            f"collection {self._collection} makes its own keys (auto_id), and {why}: {in_place}set "
            "store.auto_id_in_shadow to keep_keys for a shadow that keeps the keys and makes none, so that the "
            "application gives them from then on (docs/reference/stores/milvus.md)"
        )

    def _replicas(self) -> Row:
        """How a copy is to be loaded: as this one is, where the server tells."""
        if self._connection.lite:
            return {}
        try:
            found = self._call("describe_replica", self._collection)
        except StoreRejected:  # not for this user
            return {}
        groups = sorted({replica.resource_group for replica in found})
        return {"replica_number": len(found), "resource_groups": groups} if len(found) > 1 else {}

    def insert(self, page: Page) -> WriteReport:
        """Upserts whole rows."""
        self._must_write()
        vectors = as_batch(page.vectors, self._dim, page.ids)
        rejected = unusable(page.ids, vectors)
        kind = "strings" if self._keys.strings else "integers"
        rejected.update(
            {item: f"keys here are {kind}" for item in page.ids if isinstance(item, str) != self._keys.strings}
        )
        place = {item: row for row, item in enumerate(page.ids)}
        for part in parts([item for item in page.ids if item not in rejected], self._fitting):
            rows = []
            for item in part:
                row = place[item]
                stamp = page.stamps[row]
                payload = {name: value for name, value in page.payloads[row].items() if name not in self._made}
                fields: Row = {**payload, self._key: item, self._vector: vectors[row]}
                if self._dynamic and stamp is not None:
                    fields[STAMP] = self._as_value(stamp, vectors[row])
                rows.append(fields)
            with self._known.held() as known:
                refused = self._write_whole(rows)
                if known:
                    self._known.inserted({item: page.stamps[place[item]] for item in part if item not in refused})
            rejected.update(refused)
        return WriteReport([item for item in page.ids if item not in rejected], (), rejected)

    def _write_whole(self, rows: list[Row]) -> dict[ItemId, str]:
        """Upserts rows with their keys, by the request that this server takes them with."""
        if self._connection.lite and self._version().startswith(LITE_VERSION):  # a server is not asked for each write
            # Its upsert keeps dynamic fields that a row had before; its insert replaces the row of the same key.
            return self._send("insert", rows)
        if not self._auto_id or (how := self._given_keys.written_by) == "upsert":
            return self._upsert(rows, partial=False)
        if how is None:
            return {row[self._key]: f"{self._collection} takes no rows with given keys (auto_id)" for row in rows}
        self._delete([row[self._key] for row in rows])  # an insert would leave the row of before beside the new one
        return self._send("insert", rows)

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Removes these rows."""
        self._must_write()
        possible = [item for item in ids if isinstance(item, str) == self._keys.strings]
        for part in parts(possible, self._fitting):
            self._delete(part)

    def _delete(self, ids: list[ItemId]) -> None:
        # Not `ids=`: the client puts strings between quotes as they are.
        condition = f"{self._key} in [{', '.join(self._keys.literal(item) for item in ids)}]"
        self._may_change()
        self._call("delete", self._written_name, filter=condition)

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Moves the alias in one request."""
        self._must_write()
        if not self.exists(to):
            raise StoreRejected(f"{self._connection.where} has no collection {to!r} to point {alias!r} at")
        if self._collection_of(alias) in (None, alias):
            raise StoreRejected(f"{self._connection.where} has no alias {alias!r}")
        self._call("alter_alias", to, alias)

    def _collection_of(self, name: str) -> str | None:
        """What a name or an alias leads to."""
        if not self._call("has_collection", name):
            return None
        return str(self._call("describe_collection", name)["collection_name"])

    def drop(self) -> None:
        """Deletes the collection, unless an alias leads to it."""
        self._must_write()
        if aliases := self._aliases():
            raise StoreRejected(f"{self._collection} is not deleted: the alias {aliases[0]!r} leads to it")
        self._call("drop_collection", self._collection)
        self.close()

    def close(self) -> None:
        """Releases the connection. Safe to repeat."""
        if self._open:
            self._open = False
            self._connection.release()
