"""Qdrant: a server over REST or gRPC, or a local folder that one process at a time may open.

Why a crash or the application's own writes do no harm: on a server a write first leaves a write intent in the payload
of its items, a text that begins with the stamp. Vector and stamp are then written on the condition that the intent is
still there. An application that upserts an item removes the intent, so its write wins, and an interrupted write leaves
an intent, which is not the stamp. A local folder has no other writers: there whole points are written.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import (
    Fence,
    FurtherVectors,
    ItemId,
    Page,
    Payload,
    PayloadPage,
    Sparse,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    same_value,
)
from migrator.adapters.iterate import parts, write_halving
from migrator.adapters.qdrant.collection import UNSET, comparable, creation, late_settings
from migrator.adapters.qdrant.connection import BadRequest, MissingPoint
from migrator.adapters.qdrant.points import (
    DATATYPES,
    METRICS,
    STAMP,
    batches,
    can_be_id,
    not_json,
    numbers,
    plain_id,
    with_stamp,
)
from migrator.adapters.qdrant.reader import NAMED_SINCE, QdrantReader, datatype
from migrator.adapters.vectors import as_batch, contents, unusable

MAX_MISSING_RETRIES = 5  # times that a server may miss a point which it has


class QdrantStore(QdrantReader):
    """One collection of a Qdrant."""

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Replaces vectors and stamps; see the top of this file for what happens when others write too."""
        self._must_write()
        batch = as_batch(vectors, self._params.size, ids)
        rejected = {} if stamp is None else unusable(ids, batch)
        rows = {item: row for row, item in enumerate(ids)}
        before = None if expected is None else contents(expected)
        written: list[ItemId] = []
        deleted: list[ItemId] = []
        changed: list[ItemId] = []
        for part in parts(list(ids), self._per_request()):
            if self._connection.local and not self._further_names():
                outcome = self._write_whole(part, rows, batch, stamp, before, rejected)
            else:
                outcome = self._write_conditionally(part, rows, batch, stamp, before, rejected)
            written += outcome.written
            deleted += outcome.deleted
            changed += outcome.changed
            rejected.update(outcome.rejected)
        return WriteReport.of(written, deleted, rejected, changed)

    def _sort(
        self,
        part: Sequence[ItemId],
        rows: Mapping[ItemId, int],
        vectors: Vectors,
        before: Mapping[ItemId, Any] | None,
        rejected: Mapping[ItemId, str],
    ) -> tuple[dict[ItemId, Payload], list[ItemId], dict[ItemId, bool]]:
        """Payloads of the points to write, the deleted ones, and the changed ones.

        True for a changed one that has the new vector: an interrupted call is repeated, and the application changed
        the payload in between.
        """
        page = self.read_payloads(part) if before is None else self.read(part)
        now = dict(zip(page.ids, page.payloads, strict=True))
        deleted = [item for item in part if item not in now]
        changed: dict[ItemId, bool] = {}
        if before is not None and isinstance(page, Page):
            for item, (vector, payload) in contents(page).items():
                if item in rejected or same_value((vector, payload), before.get(item)):
                    continue
                own = self._same(vector, vectors[rows[item]])
                # Where only the vector differs, and it is the new one, the call was interrupted and is repeated.
                if not own or item not in before or not same_value(payload, before[item][1]):
                    changed[item] = own
        leave = {*changed, *rejected}
        to_write = {item: payload for item, payload in now.items() if item not in leave}
        return to_write, deleted, changed

    def _same(self, stored: bytes, vector: Vectors) -> bool:
        """Whether `stored` is what becomes of `vector` when it is written."""
        there, target = np.frombuffer(stored, np.float32).astype(np.float64), vector.astype(np.float64)
        if METRICS[self._params.distance.value] == "cosine" and target.any() and there.any():
            there, target = there / np.linalg.norm(there), target / np.linalg.norm(target)
        apart = DATATYPES[datatype(self._params)]
        return bool(np.allclose(there, target, rtol=apart, atol=apart))

    def _write_whole(
        self,
        part: list[ItemId],
        rows: Mapping[ItemId, int],
        vectors: Vectors,
        stamp: str | None,
        before: Mapping[ItemId, Any] | None,
        rejected: Mapping[ItemId, str],
    ) -> WriteReport:
        """Vector, payload and stamp of a point in one write. Only where nobody else can write at the same time."""
        from qdrant_client import models

        to_write, deleted, changed = self._sort(part, rows, vectors, before, rejected)
        points = [
            models.PointStruct(id=item, vector=self._as_vector(vectors[rows[item]]), payload=with_stamp(payload, stamp))
            for item, payload in to_write.items()
        ]
        refused = self._upsert(points)
        return WriteReport([item for item in to_write if item not in refused], deleted, refused, list(changed))

    def _write_conditionally(
        self,
        part: list[ItemId],
        rows: Mapping[ItemId, int],
        vectors: Vectors,
        stamp: str | None,
        before: Mapping[ItemId, Any] | None,
        rejected: Mapping[ItemId, str],
    ) -> WriteReport:
        """Vectors and stamps on the condition that the write intent is still there, which any other upsert removes."""
        from qdrant_client import models

        intent = f"{stamp or ''}#{uuid.uuid4().hex}"
        self._index_stamps()
        if stamp is not None:
            self._write_intent([item for item in part if item not in rejected and can_be_id(item)], intent)
        to_write, deleted, others = self._sort(part, rows, vectors, before, rejected)
        changed = list(others)
        if stamp is not None:
            # The intent stays with our vector: without it, the vector would pass for the application's.
            self._clear([item for item, own in others.items() if not own])
        condition = self._filter(stamp=intent) if stamp is not None and self._conditional() else None

        def put(items: list[ItemId]) -> None:
            """Vectors and then stamps in one request: interrupted anywhere, it leaves no stamp beside an old vector."""
            these = [models.PointVectors(id=item, vector=self._as_vector(vectors[rows[item]])) for item in items]
            operations: list[Any] = [
                models.UpdateVectorsOperation(
                    update_vectors=models.UpdateVectors(points=these, update_filter=condition)
                ),
                models.DeletePayloadOperation(delete_payload=models.DeletePayload(keys=[STAMP], points=id_list(items)))
                if stamp is None
                else models.SetPayloadOperation(
                    set_payload=models.SetPayload(payload={STAMP: stamp}, filter=self._filter(stamp=intent, ids=items))
                ),
            ]
            self._change("batch_update_points", self._written_name, operations, wait=True)

        refused = write_halving(
            list(to_write), lambda items: self._despite_missing(items, put), lambda item: item, refusal=BadRequest
        )
        self._clear(list(refused))
        points = [item for item in to_write if item not in refused]
        if not points:
            return WriteReport((), deleted, refused, changed)
        if stamp is None:
            there = set(self.read_stamps(points).ids)
            lost = [item for item in points if item not in there]
            return WriteReport([item for item in points if item in there], [*deleted, *lost], refused, changed)
        page = self.read_stamps(points) if self._conditional() else self.read_payloads(points)
        stamps = dict(zip(page.ids, page.stamps, strict=True))
        late = [item for item in page.ids if stamps[item] != stamp]
        if isinstance(page, PayloadPage):  # without conditions all that can be seen afterwards is another payload
            later = dict(zip(page.ids, page.payloads, strict=True))
            overwritten = [
                item for item in page.ids if not same_value(later[item], to_write[item]) and item not in late
            ]
            self._write_intent(overwritten, intent)
            late += overwritten
        lost = [item for item in points if item not in stamps]
        done = [item for item in points if item in stamps and item not in set(late)]
        return WriteReport(done, [*deleted, *lost], refused, [*changed, *late])

    def _despite_missing(self, items: Sequence[ItemId], change: Callable[[list[ItemId]], Any]) -> None:
        """Makes a change to those points that exist; a point deleted in between must not stop the others."""
        remaining = list(items)
        missing_retries = 0
        while remaining:
            try:
                change(remaining)
                return
            except MissingPoint as missing:
                there = set(self.read_stamps(remaining).ids)
                missing_retries += len(there) == len(remaining)
                if missing_retries > MAX_MISSING_RETRIES:  # a point may come back, but not repeatedly
                    raise StoreUnavailable(f"{self._where()} misses points that it has: {missing}") from missing
                remaining = [item for item in remaining if item in there]

    def _write_intent(self, items: Sequence[ItemId], intent: str) -> None:
        self._despite_missing(
            items,
            lambda these: self._change(
                "set_payload", self._written_name, {STAMP: intent}, points=id_list(these), wait=True
            ),
        )

    def _clear(self, items: Sequence[ItemId]) -> None:
        """Removes the stamps of these points."""
        self._despite_missing(
            items,
            lambda these: self._change("delete_payload", self._written_name, [STAMP], points=id_list(these), wait=True),
        )

    def _as_vector(self, vector: Vectors, further: FurtherVectors | None = None) -> Any:
        if further:
            return {self._name: vector.tolist(), **{name: as_given(each) for name, each in further.items()}}
        return {self._name: vector.tolist()} if self._named else vector.tolist()

    def set_fence(self, fence: Fence | None) -> None:
        """Before each change, where it is a server's; a local folder is locked."""
        self._fence = None if self._connection.local else fence

    def create_write_alias(self, alias: str) -> None:
        """On a server; a local folder is locked."""
        from qdrant_client import models

        if self._connection.local or alias in self._aliases():
            return
        create = models.CreateAlias(collection_name=self._collection, alias_name=alias)
        self._call("update_collection_aliases", [models.CreateAliasOperation(create_alias=create)])

    def delete_write_alias(self, alias: str) -> None:
        """On a server; a local folder is locked."""
        from qdrant_client import models

        if self._connection.local or alias not in self._aliases():
            return
        delete = models.DeleteAlias(alias_name=alias)
        self._call("update_collection_aliases", [models.DeleteAliasOperation(delete_alias=delete)])

    def write_through(self, alias: str) -> None:
        """Where the alias exists: a server may forbid it."""
        if not self._connection.local and alias in self._aliases():
            self._written_name = alias

    def publish(self, *, final: bool = False) -> None:
        """Nothing: a written vector answers at once."""
        self._must_write()
        self._call("get_collection", self._collection)

    def clear_migration_state(self) -> None:
        """Removes the stamps."""
        self._must_write()
        from qdrant_client import models

        self._finds_stamps()  # strict mode needs their index, also where no write has made it
        carrying = models.Filter(must_not=[models.IsEmptyCondition(is_empty=models.PayloadField(key=STAMP))])
        self._change("delete_payload", self._collection, [STAMP], points=carrying, wait=True)
        if not self._connection.local:
            self._change("delete_payload_index", self._collection, STAMP, wait=True)
            self._indexed = False

    # -- a second collection ----------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether there is a collection of that name."""
        self._must_be_open()
        return collection_id in self._collections()

    def open_collection(self, collection_id: str) -> QdrantStore:
        """Another collection over the same connection."""
        self._must_be_open()
        connection = self._connection.shared()
        try:
            store = QdrantStore(connection, collection_id, vector=self._name, write=self._write)
            if store._alias is not None:
                raise StoreRejected(f"{collection_id} is an alias and no collection")
            return store
        except BaseException:
            connection.release()
            raise

    def create_like(self, collection_id: str, *, dim: int) -> QdrantStore:
        """An empty collection of the same description, payload indexes included, for vectors of `dim`.

        What a killed call has left is completed, or made again where it is empty and differs. A collection whose
        description does not become the same is dropped again, and `StoreRejected` names the setting.
        """
        self._must_write()
        self.check_create_like(dim=dim)
        made = not self.exists(collection_id)
        if made:
            self._create(collection_id, dim)
        store = self.open_collection(collection_id)
        try:
            if (store._params.size, store._params.distance) != (dim, self._params.distance):
                raise StoreRejected(
                    f"{collection_id} exists already, with {store._params.size}-d vectors instead of {dim}-d ones: "
                    "remove it"
                )
            self._complete(collection_id)
            differs = self._difference(collection_id)
            if differs and not made and store.count() == 0:
                self._call("delete_collection", collection_id)
                made = True
                self._create(collection_id, dim)
                self._complete(collection_id)
                differs = self._difference(collection_id)
            if differs:
                advice = "use rollout.strategy in_place" if made else "remove it"
                raise StoreRejected(
                    f"{collection_id} cannot be made like {self._collection}: {differs} differs: {advice}"
                )
        except StoreRejected:
            if made:
                store.drop()
            store.close()
            raise
        return store

    def _create(self, collection_id: str, dim: int) -> None:
        from qdrant_client import models

        body = models.CreateCollection.model_validate(
            creation(self._connection.description(self._collection)["config"], without=late_settings(models))
        )
        options = {name: getattr(body, name) for name in body.model_fields_set}
        vectors = options.pop("vectors")
        if self._name or not isinstance(vectors, models.VectorParams):
            options["vectors_config"] = {**vectors, self._name: vectors[self._name].model_copy(update={"size": dim})}
        else:
            options["vectors_config"] = vectors.model_copy(update={"size": dim})
        if "sparse_vectors" in options:
            options["sparse_vectors_config"] = options.pop("sparse_vectors")
        self._call("create_collection", collection_id, **options)

    def _complete(self, collection_id: str) -> None:
        """What cannot be said when a collection is created. May be repeated: what is there already stays as it is."""
        from qdrant_client import models

        if self._connection.local:
            return
        params = self._connection.description(self._collection)["config"]["params"]
        late = {name: params[name] for name in late_settings(models) if name in params}
        if late:
            diff = models.CollectionParamsDiff.model_validate(late)
            self._call("update_collection", collection_id, collection_params=diff)
        for field, index in (self._config().payload_schema or {}).items():
            if field != STAMP:
                self._change(
                    "create_payload_index",
                    collection_id,
                    field,
                    field_schema=index.params or index.data_type,
                    wait=True,
                )

    def _difference(self, collection_id: str) -> str | None:
        """The first setting in which another collection differs from this one, apart from the vectors' length."""
        one = comparable(self._connection.description(self._collection), self._name)
        other = comparable(self._connection.description(collection_id), self._name)
        paths = [path for path in {**one, **other} if not same_value(one.get(path, UNSET), other.get(path, UNSET))]
        return min(paths, default=None)

    def check_create_like(self, *, dim: int) -> None:
        """Refuses settings and points that a second collection could not have: custom shards, points without the
        vector, and what this version of the client cannot say.
        """
        from pydantic import ValidationError
        from qdrant_client import models

        where = f"collection {self._collection}"
        config = self._connection.description(self._collection)["config"]
        if config["params"].get("sharding_method") == "custom":
            raise StoreRejected(
                f"{where} has custom sharding, and a copy would not know the shard of a point: use rollout.strategy "
                "in_place"
            )
        try:
            models.CreateCollection.model_validate(creation(config, without=late_settings(models)))
        except ValidationError as error:
            unknown = next((each for each in error.errors() if each["type"] == "extra_forbidden"), error.errors()[0])
            name = ".".join(str(part) for part in unknown["loc"])
            raise StoreRejected(
                f"{where} has the setting {name}, which this qdrant-client does not know: upgrade qdrant-client, or "
                "use rollout.strategy in_place"
            ) from error
        if self._connection.server_version() >= NAMED_SINCE:
            without = int(self._call("count", self._collection, exact=True).count) - self.count()
            if without > 0:
                raise StoreRejected(
                    f"{where} has {without} points without the vector {self._name!r}, which a copy would lose: use "
                    "rollout.strategy in_place, or move these points to a collection of their own"
                )

    def insert(self, page: Page) -> WriteReport:
        """Upserts whole points, with further vectors where the collection has such."""
        from qdrant_client import models

        self._must_write()
        if page.further is None and self._further:
            raise StoreRejected(f"points of {self._where()} have further vectors, which are not given")
        vectors = as_batch(page.vectors, self._params.size, page.ids)
        rejected = unusable(page.ids, vectors)
        rejected.update(
            {item: "Qdrant's ids are unsigned integers and UUIDs" for item in page.ids if not can_be_id(item)}
        )
        if not self._connection.local:
            rejected.update(not_json(page))
        further = page.further if page.further is not None else [{}] * len(page)
        rows = zip(page.ids, vectors, page.payloads, page.stamps, further, strict=True)
        points = [
            models.PointStruct(id=item, vector=self._as_vector(vector, more), payload=with_stamp(payload, stamp))
            for item, vector, payload, stamp, more in rows
            if item not in rejected
        ]
        sizes = [
            12 * sum(map(numbers, more.values()))
            for item, more in zip(page.ids, further, strict=True)
            if item not in rejected
        ]
        for part in batches(points, sizes, self._per_request()):
            rejected.update(self._upsert(part))
        return WriteReport([item for item in page.ids if item not in rejected], (), rejected)

    def _upsert(self, points: list[Any]) -> dict[ItemId, str]:
        """Writes points; those that are refused by themselves, with the reason."""

        def write(batch: list[Any]) -> None:
            self._change("upsert", self._written_name, batch, wait=True)

        return write_halving(points, write, lambda point: plain_id(point.id), refusal=BadRequest)

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Removes these points."""
        self._must_write()
        possible = [item for item in ids if can_be_id(item)]
        if possible:
            self._change("delete", self._written_name, points_selector=id_list(possible), wait=True)

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Moves the alias in one request."""
        from qdrant_client import models

        self._must_write()
        leads_to = {found.alias_name: found.collection_name for found in self._call("get_aliases").aliases}
        if alias not in leads_to:
            raise StoreRejected(f"{self._connection.where} has no alias {alias!r}")
        if not self.exists(to):
            raise StoreRejected(f"{self._connection.where} has no collection {to!r} to point {alias!r} at")
        if leads_to[alias] == to:
            return
        self._call(
            "update_collection_aliases",
            [
                models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
                models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=to, alias_name=alias)),
            ],
        )

    def drop(self) -> None:
        """Deletes the collection, unless an alias leads to it."""
        self._must_write()
        if aliases := self._aliases():
            raise StoreRejected(f"{self._collection} is not deleted: the alias {aliases[0]!r} leads to it")
        self._call("delete_collection", self._collection)
        self.close()

    def close(self) -> None:
        """Releases the connection. Safe to repeat."""
        if self._open:
            self._open = False
            self._connection.release()


def id_list(items: Sequence[ItemId]) -> Any:
    """For the client's types, whose lists also hold UUID objects."""
    return list(items)


def as_given(vector: NDArray[np.float64] | Sparse) -> Any:
    """Converts a vector for the client."""
    from qdrant_client import models

    if isinstance(vector, Sparse):
        return models.SparseVector(indices=vector.indices.tolist(), values=vector.values.tolist())
    return vector.tolist()
