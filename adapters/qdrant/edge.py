"""Qdrant Edge: Qdrant's engine in this process, over a folder with one shard for each collection.

    <path>/<collection>/   a shard, as `EdgeShard.create` makes it
    <path>/<alias>         a symbolic link to one of them

One process at a time has a shard open, for reading too, so there are no other writers. A point is written
whole, with vector, payload and stamp, in one operation of the engine's log, which survives a kill as a whole or not at
all: a vector never has another one's stamp. Every write ends with an fsync of the log.

The engine keeps an operation that it has refused in its log, and the next opening applies what is good of it. So
everything is checked here, and nothing that could be refused is handed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import (
    BaseStore,
    Capabilities,
    CollectionInfo,
    FurtherVectors,
    Hits,
    ItemId,
    Page,
    Reading,
    Sparse,
    StoreRejected,
    Vectors,
    WriteReport,
    order_key,
    same_value,
)
from migrator.adapters.files import translated
from migrator.adapters.iterate import parts, write_halving
from migrator.adapters.qdrant.collection import flat
from migrator.adapters.qdrant.points import (
    DATATYPES,
    METRICS,
    STAMP,
    as_stamp,
    can_be_id,
    plain_id,
    plain_vector,
    with_stamp,
)
from migrator.adapters.qdrant.shard import Folder
from migrator.adapters.vectors import as_batch, as_queries, contents, one_line, unusable

if TYPE_CHECKING:
    from qdrant_edge import Filter, Record

T = TypeVar("T")

KEYS = ("kind", "engine", "path", "collection", "vector", "timeout")
PART_BYTES = 8 << 20  # of vectors that are read or written in one go
PART_ITEMS = 5_000
PART_ITEMS_WHOLE = 500  # of points with further vectors, whose size is not known
HNSW = {"m": 16, "ef_construct": 100}  # the engine's own default


def open_edge_store(config: Mapping[str, Any], *, write: bool) -> EdgeStore:
    """Opens `config["collection"]`, a shard's folder or a symbolic link to one, in the folder `path`.

    Raises `StoreRejected` for what is not there or cannot be migrated, `StoreBusy` if another process has it open.
    """
    if config["engine"] != "edge":
        raise StoreRejected(f"a qdrant store's `engine` is local or edge, not {config['engine']!r}")
    unknown = sorted(set(config) - set(KEYS))
    if unknown or "path" not in config:
        wrong = f"remove `{unknown[0]}`" if unknown else "give its `path`"
        raise StoreRejected(f"a qdrant store with engine edge is a folder, and no server: {wrong}")
    folder = Folder(Path(config["path"]))
    return EdgeStore(folder, str(config["collection"]), vector=config.get("vector"), write=write)


class EdgeStore(BaseStore):
    """One collection of a folder of shards."""

    def __init__(self, folder: Folder, collection: str, *, vector: str | None, write: bool) -> None:
        self._folder, self._write = folder, write
        self._collection, self._alias = folder.resolve(collection)
        self._shard = folder.acquire(self._collection)
        try:
            self._name, self._params = self._vector(vector)
            if write:
                folder.remove_leftovers()
        except BaseException:
            self.close()
            raise

    # -- facts ----------------------------------------------------------------------------------------------------

    def _call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the engine's shard by its name."""
        self._must_be_open()
        return self._shard.call(method, *arguments)

    def _vector(self, wanted: str | None) -> tuple[str, dict[str, Any]]:
        """Name (empty for the unnamed one) and parameters of the vector that is migrated."""
        vectors: dict[str, dict[str, Any]] = self._shard.config.get("vectors") or {}
        where = f"collection {self._collection}"
        if not vectors:
            raise StoreRejected(f"{where} has no dense vectors: only these can be migrated")
        names = ", ".join(repr(name) for name in sorted(vectors))
        if wanted is None and len(vectors) > 1:
            raise StoreRejected(f"{where} has the vectors {names}: name one with `vector`")
        name = next(iter(vectors)) if wanted is None else wanted
        if name not in vectors:
            raise StoreRejected(f"{where} has no vector {name!r}, but {names}: correct `vector` of the store")
        params = vectors[name]
        if params.get("multivector_config"):
            raise StoreRejected(f"{where} holds multi-vectors, which cannot be migrated")
        datatype = params.get("datatype") or "float32"
        if datatype not in DATATYPES:
            known = " or ".join(DATATYPES)
            raise StoreRejected(f"{where} keeps its vectors as {datatype}, which can be migrated as {known} only")
        if params["distance"] not in METRICS:
            known = ", ".join(METRICS)
            raise StoreRejected(f"{where} has the distance {params['distance']}, known are {known}")
        return name, params

    @property
    def _dim(self) -> int:
        return int(self._params["size"])

    @property
    def _further_names(self) -> list[str]:
        config = self._shard.config
        return [name for name in [*config["vectors"], *(config.get("sparse_vectors") or {})] if name != self._name]

    @property
    def capabilities(self) -> Capabilities:
        """What this collection allows."""
        return Capabilities(
            update_in_place=True,
            visible="at_once",
            stamps=True,
            concurrent_writers=False,
            exact_vectors=(self._params.get("datatype") or "float32") == "float32",
            normalises=METRICS[self._params["distance"]] == "cosine",
            partial_update=True,  # in effect: whole points are written, but nobody else can write meanwhile
            aliases=True,
            notes=(
                *self._notes_of_further(),
                "one process at a time has the collection open: stop the application for each run",
                "an application that replaces a vector with update_vectors, and does not upsert the point, keeps the "
                "stamp: let it delete the payload key _migrator too, or such a change is not found",
                "a new vector is searched without the HNSW index until the cutover, which rebuilds it",
            ),
        )

    def _notes_of_further(self) -> tuple[str, ...]:
        names = ", ".join(map(repr, sorted(self._further_names)))
        return (
            (f"the vectors {names} stay as they are: in place they are not touched, a shadow has them too",)
            if names
            else ()
        )

    def describe(self) -> CollectionInfo:
        """Facts of the collection as it is now. The schema is taken from the first points' payloads."""
        schema: dict[str, str] = {}
        for record in self._records(self._filter(), None, None, 100, payload=True):
            for field, value in (record.payload or {}).items():
                if field != STAMP:
                    schema.setdefault(field, type(value).__name__)
        config = self._shard.config
        hnsw = {**HNSW, **(config.get("hnsw_config") or {}), **(self._params.get("hnsw_config") or {})}
        index = f"HNSW m={hnsw['m']} ef_construct={hnsw['ef_construct']}"
        quantization = self._params.get("quantization_config") or config.get("quantization_config")
        if quantization:
            index += f", {next(iter(quantization))} quantisation"
        return CollectionInfo(
            name=f"qdrant-edge:{self._folder.path}/{self._collection}",
            collection_id=self._collection,
            dim=self._dim,
            metric=METRICS[self._params["distance"]],
            count=self.count(),
            index=index,
            server=f"qdrant-edge {metadata.version('qdrant-edge-py')}",
            schema=schema,
            bytes_on_disk=_bytes_on_disk(self._shard.path / "segments"),
            alias=self._alias,
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` ids: integers ascending, then UUIDs."""
        return [plain_id(record.id) for record in self._records(self._filter(), after, up_to, limit)]

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` points with everything."""
        records = list(self._records(self._filter(), after, up_to, limit, vectors=True, payload=True))
        return self._reading(records, vectors=True, payload=True).page()

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids of points whose payload does not carry the stamp."""
        return [plain_id(record.id) for record in self._records(self._filter(without=stamp), after, None, limit)]

    def _filter(
        self, *, stamp: str | None = None, without: str | None = None, ids: Sequence[ItemId] | None = None
    ) -> Filter:
        """Points that have the vector: others are no items."""
        from qdrant_edge import FieldCondition, Filter, HasIdCondition, HasVectorCondition, MatchValue

        def carries(value: str) -> FieldCondition:
            return FieldCondition(STAMP, match=MatchValue(value))

        must: list[Any] = [HasVectorCondition(self._name)]
        if stamp is not None:
            must.append(carries(stamp))
        if ids is not None:
            must.append(HasIdCondition(set(ids)))
        return Filter(must=must, must_not=None if without is None else [carries(without)])

    def _records(
        self,
        condition: Filter,
        after: ItemId | None,
        up_to: ItemId | None,
        limit: int,
        *,
        vectors: bool = False,
        payload: bool = False,
    ) -> Iterator[Record]:
        from qdrant_edge import ScrollRequest

        # The offset is inclusive and need not exist; what is no id of Qdrant's cannot be one.
        offset: Any = after if after is not None and can_be_id(after) else None
        beyond = None if after is None else order_key(after)
        last = None if up_to is None else order_key(up_to)
        while limit > 0:
            request = ScrollRequest(
                offset=offset,
                limit=min(limit + 1, self._per_part() if vectors else 10_000),
                filter=condition,
                with_payload=payload,
                with_vector=[self._name] if vectors else False,
            )
            records, offset = self._call("scroll", request)
            for record in records:
                if beyond is not None or last is not None:
                    key = order_key(plain_id(record.id))
                    if last is not None and key > last:
                        return
                    if beyond is not None and key <= beyond:
                        continue
                    beyond = None  # the rest are in order
                yield record
                limit -= 1
                if limit == 0:
                    return
            if offset is None:
                return

    def _read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Reading:
        """The points as they were written last."""
        found: dict[ItemId, Record] = {}
        fields: Any = True if payload else [STAMP]
        for part in parts(ids, self._per_part()):
            found.update(self._fetch(part, fields, [self._name] if vectors else False))
        return self._reading([found[item] for item in ids if item in found], vectors=vectors, payload=payload)

    def _fetch(self, ids: Sequence[ItemId], payload: Any, vectors: Any) -> dict[ItemId, Record]:
        from qdrant_edge import ScrollRequest

        possible = [item for item in ids if can_be_id(item)]
        request = ScrollRequest(
            limit=len(possible), filter=self._filter(ids=possible), with_payload=payload, with_vector=vectors
        )
        records, _ = self._call("scroll", request) if possible else ([], None)
        return {plain_id(record.id): record for record in records}

    def _reading(self, records: Sequence[Record], *, vectors: bool, payload: bool) -> Reading:
        payloads = [record.payload or {} for record in records]
        stamps = [as_stamp(fields.pop(STAMP, None)) for fields in payloads]
        ids = [plain_id(record.id) for record in records]
        return Reading(ids, self._stacked(records) if vectors else None, payloads if payload else None, stamps)

    def _stacked(self, records: Iterable[Record]) -> Vectors:
        """Vectors of records, (n, dim). The engine gives lists: each goes as soon as it is copied."""
        rows = (self._vector_of(record) for record in records)
        return np.fromiter(itertools.chain.from_iterable(rows), np.float32).reshape(-1, self._dim)

    def _vector_of(self, record: Record) -> Any:
        vector: Any = record.vector
        return vector[self._name] if isinstance(vector, dict) else vector

    def _per_part(self) -> int:
        most = PART_ITEMS_WHOLE if self._further_names else PART_ITEMS
        return max(1, min(most, PART_BYTES // (4 * self._dim)))

    def count(self, *, stamp: str | None = None) -> int:
        """Exact number of points; with `stamp`, of those that carry it."""
        from qdrant_edge import CountRequest

        request = CountRequest(exact=True, filter=self._filter(stamp=stamp))
        return int(self._call("count", request))

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest points to each of `vectors` (n, dim). `exact` compares with all of them."""
        from qdrant_edge import Query, QueryBatchRequest, QueryRequest, SearchParams

        queries = as_queries(vectors, self._dim, k)
        l2 = METRICS[self._params["distance"]] == "l2"
        ids: list[list[ItemId]] = []
        scores: list[list[float]] = []
        for start in range(0, len(queries), 100):
            batch = QueryBatchRequest(
                [
                    QueryRequest(
                        limit=k,
                        query=Query.Nearest(query, using=self._name or None),
                        params=SearchParams(exact=exact),
                    )
                    for query in queries[start : start + 100].tolist()
                ]
            )
            for answer in self._call("query_batch", batch):
                ids.append([plain_id(point.id) for point in answer])
                scores.append([-(point.score**2) if l2 else point.score for point in answer])
        return Hits(ids, scores)

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Writes whole points: the new vector, the new stamp, and everything else as it is."""
        self._must_write()
        batch = as_batch(vectors, self._dim, ids)
        rejected = {} if stamp is None else unusable(ids, batch)
        rows = {item: row for row, item in enumerate(ids)}
        before = None if expected is None else contents(expected)
        whole = bool(self._further_names)
        which: Any = True if whole else [self._name] if before is not None else False
        written: list[ItemId] = []
        deleted: list[ItemId] = []
        changed: list[ItemId] = []
        for part in parts(ids, self._per_part()):
            with self._shard.guard:
                found = self._fetch(part, True, which)
                there = [item for item in part if item in found]
                deleted += [item for item in part if item not in found]
                page = self._reading([found[item] for item in there], vectors=before is not None, payload=True)
                leave = set(rejected)
                if before is not None:
                    now = contents(page.page())
                    # What bears our stamp has been written by this very call, which is repeated.
                    own = {
                        item for item, carried in zip(there, page.stamps, strict=True) if carried == stamp is not None
                    }
                    others = [
                        item
                        for item in there
                        if item not in rejected
                        and not same_value(now[item], before.get(item))
                        and not (item in own and item in before and same_value(now[item][1], before[item][1]))
                    ]
                    changed += others
                    leave.update(others)
                points = [
                    (item, batch[rows[item]], with_stamp(payload, stamp), found[item].vector if whole else None)
                    for item, payload in zip(there, page.payloads or (), strict=True)
                    if item not in leave
                ]
                rejected.update(self._put(points, create=False))
                written += [item for item, *_ in points if item not in rejected]
        self._shard.sync()
        return WriteReport.of(written, deleted, rejected, changed)

    def _put(self, points: Sequence[tuple[ItemId, Vectors, dict[str, Any], Any]], *, create: bool) -> dict[ItemId, str]:
        """Writes points, each with its further vectors by name; tells which were refused, and why."""
        from qdrant_edge import Point

        rejected: dict[ItemId, str] = {}
        ready: list[Any] = []
        for item, vector, payload, others in points:
            new: Any = vector.tolist()  # which the engine takes faster than an array
            if isinstance(others, dict) and others:
                new = {**others, self._name: new}
            elif self._name:
                new = {self._name: new}
            try:
                ready.append(Point(item, new, payload))
            except (TypeError, ValueError) as error:
                rejected[item] = f"the payload cannot be stored: {one_line(error)}"
        return {**rejected, **self._upsert(ready, create=create)}

    def _upsert(self, points: list[Any], *, create: bool) -> dict[ItemId, str]:
        """Writes points; those that are refused by themselves, with the reason."""
        from qdrant_edge import UpdateMode, UpdateOperation

        mode = UpdateMode.Upsert if create else UpdateMode.UpdateOnly

        def write(batch: list[Any]) -> None:
            self._must_be_open()
            # The engine may also refuse what an operation is made of.
            self._shard.ask(lambda edge: edge.update(UpdateOperation.upsert_points(batch, update_mode=mode)))

        return write_halving(points, write, lambda point: plain_id(point.id))

    def publish(self, *, final: bool = False) -> None:
        """Nothing: a written vector answers at once. `final` builds the HNSW index over what was written."""
        self._must_write()
        if final:
            self._call("optimize")
        self._call("flush")

    def clear_migration_state(self) -> None:
        """Removes the stamps."""
        self._must_write()
        from qdrant_edge import Filter, IsEmptyCondition, UpdateOperation

        carrying = Filter(must_not=[IsEmptyCondition(STAMP)])
        self._call("update", UpdateOperation.delete_payload_by_filter(carrying, [STAMP]))
        self._call("flush")

    # -- a second collection ----------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether there is a collection of that name; not an alias."""
        self._must_be_open()
        return self._folder.exists(collection_id)

    def open_collection(self, collection_id: str) -> EdgeStore:
        """Another collection of the folder."""
        if not self.exists(collection_id):
            raise StoreRejected(f"{self._folder.path} has no collection {collection_id!r}")
        return EdgeStore(self._folder, collection_id, vector=self._name, write=self._write)

    def create_like(self, collection_id: str, *, dim: int) -> EdgeStore:
        """An empty collection with the same settings and payload indexes, for vectors of `dim`.

        One whose settings do not become the same is dropped again, and `StoreRejected` names the setting.
        """
        self._must_write()
        self.check_create_like(dim=dim)
        made = not self.exists(collection_id)
        if made:
            vectors = {**self._shard.config["vectors"], self._name: {**self._params, "size": dim}}
            found = self._call("info").payload_schema
            indexes = {field: index.params or index.data_type for field, index in found.items() if field != STAMP}
            self._folder.create(collection_id, {**self._shard.config, "vectors": vectors}, indexes)
        store = self.open_collection(collection_id)
        try:
            if (store._dim, store._params["distance"]) != (dim, self._params["distance"]):
                raise StoreRejected(
                    f"{collection_id} exists already, with {store._dim}-d vectors instead of {dim}-d ones: remove it"
                )
            if lost := self._lost(store):
                advice = "use rollout.strategy in_place" if made else "remove it"
                raise StoreRejected(f"{collection_id} cannot be made like {self._collection}: {lost} differs: {advice}")
        except StoreRejected:
            if made:
                store.drop()
            store.close()
            raise
        return store

    def _lost(self, store: EdgeStore) -> str | None:
        """The first setting of this collection that another one does not have; it may have more, which are defaults."""
        one, other = self._settings(), store._settings()
        return min((path for path in one if not same_value(one[path], other.get(path))), default=None)

    def _settings(self) -> dict[str, Any]:
        """Each setting under its path, but for the length of the vector, and the parameters of payload indexes."""
        params = {name: value for name, value in self._params.items() if name != "size"}
        config = {**self._shard.config, "vectors": {**self._shard.config["vectors"], self._name: params}}
        found = dict(flat(config, ""))
        for field, index in self._call("info").payload_schema.items():
            if field != STAMP:
                found[f"payload index {field}"] = (str(index.data_type), _fields(index.params))
        return found

    def check_create_like(self, *, dim: int) -> None:
        """Refuses a collection with points that lack the vector."""
        from qdrant_edge import CountRequest

        without = self._call("count", CountRequest(exact=True)) - self.count()
        if without > 0:
            raise StoreRejected(
                f"collection {self._collection} has {without} points without the vector {self._name!r}, which a copy "
                "would lose: use rollout.strategy in_place, or move these points to a collection of their own"
            )

    def read_further(self, ids: Sequence[ItemId]) -> list[FurtherVectors] | None:
        """What points have besides the vector that is migrated; None if the collection has no such vectors."""
        names = self._further_names
        if not names:
            return None
        found: dict[ItemId, FurtherVectors] = {}
        for part in parts(ids, self._per_part()):
            for item, record in self._fetch(part, False, names).items():
                held: Any = record.vector if isinstance(record.vector, dict) else {"": record.vector}
                found[item] = {name: plain_vector(vector) for name, vector in held.items() if name in names and vector}
        return [found.get(item, {}) for item in ids]

    def insert(self, page: Page) -> WriteReport:
        """Upserts whole points, with further vectors where the collection has such."""
        self._must_write()
        if page.further is None and self._further_names:
            raise StoreRejected(f"points of collection {self._collection} have further vectors, which are not given")
        vectors = as_batch(page.vectors, self._dim, page.ids)
        rejected = unusable(page.ids, vectors)
        rejected.update(
            {item: "Qdrant's ids are unsigned integers and UUIDs" for item in page.ids if not can_be_id(item)}
        )
        further = page.further if page.further is not None else [{}] * len(page)
        rows = zip(page.ids, vectors, page.payloads, page.stamps, further, strict=True)
        points = [
            (item, vector, with_stamp(payload, stamp), {name: _as_given(each) for name, each in more.items()})
            for item, vector, payload, stamp, more in rows
            if item not in rejected
        ]
        size = self._per_part()
        for start in range(0, len(points), size):
            rejected.update(self._put(points[start : start + size], create=True))
        self._shard.sync()
        return WriteReport([item for item in page.ids if item not in rejected], (), rejected)

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Removes these points."""
        self._must_write()
        from qdrant_edge import UpdateOperation

        possible: list[Any] = [item for item in ids if can_be_id(item)]
        if possible:
            self._call("update", UpdateOperation.delete_points(possible))
        self._shard.sync()

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Replaces the symbolic link in one step."""
        self._must_write()
        self._folder.point(alias, to)

    def drop(self) -> None:
        """Deletes the collection, unless an alias leads to it."""
        self._must_write()
        for alias, collection_id in self._folder.aliases().items():
            if collection_id == self._collection:
                raise StoreRejected(f"{self._collection} is not deleted: the alias {alias!r} leads to it")
        self._folder.remove(self._collection)
        self._open = False

    def close(self) -> None:
        """Releases the shard. Safe to repeat."""
        if self._open:
            self._open = False
            self._folder.release(self._shard)


def _as_given(vector: NDArray[np.float64] | Sparse) -> Any:
    from qdrant_edge import SparseVector

    if isinstance(vector, Sparse):
        return SparseVector(vector.indices.tolist(), vector.values.tolist())
    return vector.tolist()


def _fields(params: Any) -> dict[str, str]:
    """The parameters of a payload index; the engine's objects compare by identity."""
    names = [name for name in dir(params) if not name.startswith("_")]
    return {name: str(getattr(params, name)) for name in names}


def _bytes_on_disk(folder: Path) -> int:
    """What the files take; many are larger on paper."""
    with translated(folder):
        return sum(512 * place.stat().st_blocks for place in folder.rglob("*") if place.is_file())
