"""Facts and items of a Qdrant collection, as a server or a local folder gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from migrator.adapters.base import (
    BaseStore,
    Capabilities,
    CollectionInfo,
    Fence,
    FurtherVectors,
    Hits,
    ItemId,
    Page,
    Reading,
    Sparse,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    order_key,
)
from migrator.adapters.iterate import parts
from migrator.adapters.qdrant.connection import Connection
from migrator.adapters.qdrant.points import (
    DATATYPES,
    METRICS,
    REQUEST_BYTES,
    STAMP,
    as_stamp,
    can_be_id,
    plain_id,
    plain_vector,
)
from migrator.adapters.vectors import as_queries

T = TypeVar("T")

OLDEST = (1, 10)  # the first server version that answers as the client asks (query/batch)
NAMED_SINCE = (1, 13)  # the first that can be asked which points have a certain vector
CONDITIONAL = (1, 16)  # the first with update_filter
ITEMS_WHOLE = 500  # points with further vectors that are read at once, as their size is not known


class QdrantReader(BaseStore):
    """A collection of a Qdrant, for reading. It shares `connection`, and releases it when it is closed."""

    def __init__(self, connection: Connection, collection: str, *, vector: str | None, write: bool) -> None:
        self._connection, self._write = connection, write
        self._collection, self._alias = self._resolve(collection)
        self._written_name = self._collection
        self._name, self._params = self._vector(vector)
        self._named = bool(self._name)
        self._further = tuple(sorted(self._further_names()))
        self._which: Any = [self._name] if self._named or self._further else True
        self._indexed = False
        self._fence: Fence | None = None

    # -- facts ----------------------------------------------------------------------------------------------------

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the client by its name."""
        self._must_be_open()
        return self._connection.call(method, *arguments, **options)

    def _resolve(self, collection: str) -> tuple[str, str | None]:
        """The collection's own name, and the alias if it was that."""
        there = self._collections()
        if collection in there:
            return collection, None
        for found in self._connection.call("get_aliases").aliases:
            if found.alias_name == collection:
                if found.collection_name not in there:
                    raise StoreRejected(
                        f"the alias {collection!r} leads to {found.collection_name!r}, which is no collection of "
                        f"{self._connection.where}"
                    )
                return found.collection_name, collection
        raise StoreRejected(
            f"{self._connection.where} has no collection or alias {collection!r}: correct `collection` of the store"
        )

    def _collections(self) -> set[str]:
        return {found.name for found in self._connection.call("get_collections").collections}

    def _config(self) -> Any:
        return self._connection.call("get_collection", self._collection)

    def _vector(self, wanted: str | None) -> tuple[str, Any]:
        """Name (empty for the unnamed one) and parameters of the vector that is migrated."""
        from qdrant_client import models

        config = self._config().config
        strict = config.strict_mode_config
        self._strict = strict if strict is not None and strict.enabled else None
        found = config.params.vectors
        vectors = {"": found} if isinstance(found, models.VectorParams) else dict(found or {})
        where = f"collection {self._collection}"
        if not vectors:
            raise StoreRejected(f"{where} has no dense vectors: only these can be migrated")
        names = ", ".join(repr(name) for name in vectors)
        if wanted is None and len(vectors) > 1:
            raise StoreRejected(f"{where} has the vectors {names}: name one with `vector`")
        name = next(iter(vectors)) if wanted is None else wanted
        if name not in vectors:
            raise StoreRejected(f"{where} has no vector {name!r}, but {names}: correct `vector` of the store")
        params = vectors[name]
        if params.multivector_config is not None:
            raise StoreRejected(f"{where} holds multi-vectors, which cannot be migrated")
        if datatype(params) not in DATATYPES:
            known = " or ".join(DATATYPES)
            raise StoreRejected(
                f"{where} keeps its vectors as {datatype(params)}, which can be migrated as {known} only"
            )
        if params.distance.value not in METRICS:
            known = ", ".join(METRICS)
            raise StoreRejected(f"{where} has the distance {params.distance.value}, known are {known}")
        several = len(vectors) > 1 or bool(config.params.sparse_vectors)
        oldest = NAMED_SINCE if name or several else OLDEST
        if not self._connection.local and self._connection.server_version() < oldest:
            what = "one of several vectors" if several else "a named vector" if name else "a vector"
            raise StoreRejected(
                f"{self._connection.where} is a Qdrant {self._connection.version()}: migrating {what} needs "
                f"{'.'.join(map(str, oldest))} or newer"
            )
        return name, params

    @property
    def capabilities(self) -> Capabilities:
        """What this server, and this collection, allow."""
        local = self._connection.local
        notes = [
            "an application that replaces a vector with update_vectors, and does not upsert the point, keeps the "
            "stamp: let it delete the payload key _migrator too, or such a change is not found"
        ]
        if not local and not self._conditional():
            notes.append(
                "this server has no conditional updates (1.16 has): an upsert of the application within the "
                "milliseconds of a write is found only if it changes the payload"
            )
        if self._connection.exposed:
            notes.append("the api key travels over http, where others can read it: use https")
        if self._further:
            names = ", ".join(map(repr, self._further))
            notes.append(f"the vectors {names} stay as they are: in place they are not touched, a shadow has them too")
        if local:
            notes.append("a local folder is open in one process at a time: stop the application for each run")
            notes.append(
                "a local folder keeps vectors, payloads and metadata, but neither index settings nor payload indexes: "
                "nor does a shadow in it"
            )
        return Capabilities(
            update_in_place=True,
            visible="at_once",
            stamps=True,
            concurrent_writers=not local,
            exact_vectors=datatype(self._params) == "float32",
            normalises=METRICS[self._params.distance.value] == "cosine",
            partial_update=True,
            aliases=True,
            notes=tuple(notes),
        )

    def _conditional(self) -> bool:
        return self._connection.server_version() >= CONDITIONAL

    def describe(self) -> CollectionInfo:
        """Facts of the collection as it is now. The schema is taken from the first points' payloads."""
        config = self._config().config
        some = self._allowed(100, "max_query_limit")
        records, _ = self._call("scroll", self._collection, limit=some, with_payload=True, with_vectors=False)
        schema: dict[str, str] = {}
        for record in records:
            for field, value in (record.payload or {}).items():
                if field != STAMP:
                    schema.setdefault(field, type(value).__name__)
        hnsw = self._params.hnsw_config or config.hnsw_config
        index = f"HNSW m={hnsw.m} ef_construct={hnsw.ef_construct}" if hnsw else "brute force"
        quantization = self._params.quantization_config or config.quantization_config
        if quantization is not None:
            index += f", {next(iter(quantization.model_dump(exclude_none=True)))} quantisation"
        return CollectionInfo(
            name=f"qdrant:{self._connection.where}/{self._collection}",
            collection_id=self._collection,
            dim=self._params.size,
            metric=METRICS[self._params.distance.value],
            count=self.count(),
            index="brute force (local)" if self._connection.local else index,
            server=f"qdrant {'client ' if self._connection.local else ''}{self._connection.version()}",
            schema=schema,
            alias=self._alias,
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` ids: integers ascending, then UUIDs."""
        return self._scroll(self._filter(), after, up_to, limit)

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Ids of points whose payload does not carry the stamp."""
        condition = self._filter(without=stamp) if self._finds_stamps() else self._filter()
        return self._scroll(condition, after, None, limit)

    def _filter(self, *, stamp: str | None = None, without: str | None = None, ids: Sequence[ItemId] = ()) -> Any:
        from qdrant_client import models

        def carries(value: str) -> models.FieldCondition:
            return models.FieldCondition(key=STAMP, match=models.MatchValue(value=value))

        must: list[Any] = []
        # An older server cannot tell the points with an unnamed vector from others.
        if self._connection.server_version() >= NAMED_SINCE:
            must.append(models.HasVectorCondition(has_vector=self._name))
        if stamp is not None:
            must.append(carries(stamp))
        if ids:
            must.append(models.HasIdCondition(has_id=list(ids)))
        return models.Filter(must=must or None, must_not=None if without is None else [carries(without)])

    def _scroll(self, condition: Any, after: ItemId | None, up_to: ItemId | None, limit: int) -> list[ItemId]:
        size = self._allowed(10_000, "max_query_limit")
        records = self._records(condition, after, up_to, limit, size, fields=False, which=False)
        return [plain_id(record.id) for record in records]

    def _records(
        self,
        condition: Any,
        after: ItemId | None,
        up_to: ItemId | None,
        limit: int,
        per_request: int,
        *,
        fields: Any,
        which: Any,
    ) -> list[Any]:
        """The next `limit` points that meet the condition, with the payload `fields` and the vectors asked for."""
        found: list[Any] = []
        # The offset is inclusive and need not exist; what is no id of Qdrant's cannot be one.
        offset: Any = after if after is not None and can_be_id(after) else None
        beyond = None if after is None else order_key(after)
        last = None if up_to is None else order_key(up_to)
        reached: tuple[bool, int, str] | None = None
        while len(found) < limit:
            size = min(limit - len(found) + 1, per_request)
            records, offset = self._call(
                "scroll",
                self._collection,
                scroll_filter=condition,
                limit=size,
                offset=offset,
                with_payload=fields,
                with_vectors=which,
                consistency=majority(),
            )
            for record in records:
                key = order_key(plain_id(record.id))
                if reached is not None and key <= reached:
                    raise StoreRejected(f"{self._where()} returns its points out of order: {record.id} appears again")
                reached = key
                if last is not None and key > last:
                    return found[:limit]
                # Before 1.13 a filter cannot ask for the vector, and a point may lack it.
                if (beyond is None or key > beyond) and (not which or self._vector_of(record) is not None):
                    found.append(record)
            if offset is None:
                break
            if not records:
                raise StoreRejected(f"{self._where()} returns an empty page and reports that there are more")
        return found[: max(limit, 0)]

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` points with vectors and payloads, in one scroll."""
        size = self._allowed(self._per_request(), "max_query_limit")
        records = self._records(self._filter(), after, up_to, limit, size, fields=True, which=self._which)
        return self._reading(records, vectors=True, payload=True).page()

    def _read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Reading:
        """The points as they were written last."""
        fields: Any = True if payload else [STAMP]
        which: Any = self._which if vectors or self._which is not True else False
        found = {
            item: record
            for item, record in self._retrieve(ids, fields, which, self._per_request()).items()
            if not which or self._vector_of(record) is not None
        }
        self._check_none_missing(ids, found)
        return self._reading([found[item] for item in ids if item in found], vectors=vectors, payload=payload)

    def _retrieve(self, ids: Sequence[ItemId], fields: Any, which: Any, size: int) -> dict[ItemId, Any]:
        found: dict[ItemId, Any] = {}
        possible = [item for item in ids if can_be_id(item)]
        for part in parts(possible, size):
            records = self._call(
                "retrieve", self._collection, ids=part, with_payload=fields, with_vectors=which, consistency=majority()
            )
            found.update({plain_id(record.id): record for record in records})
        return found

    def _check_none_missing(self, ids: Sequence[ItemId], found: Mapping[ItemId, Any]) -> None:
        missing = [item for item in ids if can_be_id(item) and item not in found]
        if missing and not self._connection.local and (left := self._count(self._filter(ids=missing))):
            raise StoreUnavailable(f"{self._where()} returned {left} of the requested points fewer than exist")

    def read_further(self, ids: Sequence[ItemId]) -> list[FurtherVectors] | None:
        """What points have besides the vector that is migrated; None if the collection has no such vectors."""
        names = self._further_names()
        if not names:
            return None
        size = min(ITEMS_WHOLE, self._per_request())
        found = self._retrieve(ids, False, list(names), size)
        self._check_none_missing(ids, found)
        return [self._further_of(found[item], names) if item in found else {} for item in ids]

    def _further_of(self, record: Any, names: Mapping[str, str | None]) -> FurtherVectors:
        held = record.vector if isinstance(record.vector, dict) else {"": record.vector} if record.vector else {}
        further = {name: plain_vector(vector) for name, vector in held.items() if name in names}
        if self._connection.local:  # a folder keeps these as they were given, and the client scales what it adds
            for name, vector in further.items():
                if names[name] == "Cosine" and not isinstance(vector, Sparse):
                    length = np.linalg.norm(vector, axis=-1, keepdims=True)
                    further[name] = np.divide(vector, length, out=vector.copy(), where=length > 0)
        return further

    def _reading(self, records: Sequence[Any], *, vectors: bool, payload: bool) -> Reading:
        payloads = [dict(record.payload or {}) for record in records]
        stamps = [as_stamp(fields.pop(STAMP, None)) for fields in payloads]
        stacked: Vectors | None = None
        if vectors:
            stacked = self._stacked(records)
        return Reading([plain_id(record.id) for record in records], stacked, payloads if payload else None, stamps)

    def _stacked(self, records: Sequence[Any]) -> Vectors:
        dim = self._params.size
        try:
            vectors = np.array([self._vector_of(record) for record in records], np.float32).reshape(len(records), dim)
        except (ValueError, TypeError) as error:
            for record in records:
                if np.shape(self._vector_of(record)) != (dim,):
                    raise StoreRejected(
                        f"{self._where()} returned for point {record.id} a vector that is not {dim} numbers"
                    ) from error
            raise
        # Over REST it could not be put back, and no search finds it.
        finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
        if not finite.all():
            item = records[int(np.flatnonzero(~finite)[0])].id
            raise StoreRejected(f"{self._where()} holds a vector that is not finite, of point {item}: fix it first")
        return vectors

    def _where(self) -> str:
        return f"collection {self._collection} of {self._connection.where}"

    def _vector_of(self, record: Any) -> Any:
        if isinstance(record.vector, dict):  # {} is a server's word for none
            return record.vector.get(self._name)
        return record.vector or None

    def _per_request(self) -> int:
        size = int(max(1, min(5_000, REQUEST_BYTES // (12 * self._params.size + 500))))
        return self._allowed(size, "upsert_max_batchsize", "condition_max_size")

    def _allowed(self, size: int, *limits: str) -> int:
        """As much of `size` as the collection's strict mode lets through."""
        set_limits = (getattr(self._strict, limit, None) for limit in limits)
        return max(1, min([size, *(int(limit) for limit in set_limits if limit)]))

    def _finds_stamps(self) -> bool:
        """Whether points can be asked for by their stamp. If not, none has one: the first write makes the index."""
        if self._strict is None or self._strict.unindexed_filtering_retrieve is not False:
            return True
        if self._write:
            self._index_stamps()
            return True
        return STAMP in (self._config().payload_schema or {})

    def count(self, *, stamp: str | None = None) -> int:
        """Exact number of points; with `stamp`, of those that carry it."""
        if stamp is not None and not self._finds_stamps():
            return 0
        return self._count(self._filter(stamp=stamp))

    def _count(self, condition: Any) -> int:
        return int(self._call("count", self._collection, count_filter=condition, exact=True).count)

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest points to each of `vectors` (n, dim). `exact` compares with all of them."""
        from qdrant_client import models

        queries = as_queries(vectors, self._params.size, k)
        requests = [
            models.QueryRequest(
                query=query,
                using=self._name or None,
                limit=k,
                with_payload=False,
                params=models.SearchParams(exact=True) if exact and not self._connection.local else None,
            )
            for query in queries.tolist()
        ]
        ids: list[list[ItemId]] = []
        scores: list[list[float]] = []
        size = self._allowed(100, "search_max_batchsize")
        for start in range(0, len(requests), size):
            block = requests[start : start + size]
            answers = self._call("query_batch_points", self._collection, requests=block)
            for answer in answers:
                ids.append([plain_id(point.id) for point in answer.points])
                values = [float(point.score) for point in answer.points]
                if METRICS[self._params.distance.value] == "l2":
                    values = [-(value**2) for value in values]
                scores.append(values)
        return Hits(ids, scores)

    # -- what reading needs of the collection -----------------------------------------------------------------------

    def _further_names(self) -> dict[str, str | None]:
        """Names of the vectors besides the one that is migrated, with the distance of those that are not sparse."""
        from qdrant_client import models

        params = self._config().config.params
        dense = {"": params.vectors} if isinstance(params.vectors, models.VectorParams) else params.vectors or {}
        found: dict[str, str | None] = {name: each.distance.value for name, each in dense.items() if name != self._name}
        return {**found, **dict.fromkeys(params.sparse_vectors or {})}

    def _aliases(self) -> list[str]:
        """Aliases of this collection."""
        found = self._call("get_collection_aliases", self._collection).aliases
        return [each.alias_name for each in found]

    def _change(self, method: str, *arguments: Any, **options: Any) -> None:
        """Makes a change, or several in one request, and checks that they were applied and not only queued."""
        if self._fence is not None:
            self._fence(self._connection.timeout)
        result = self._call(method, *arguments, **options)
        for each in result if isinstance(result, list) else [result]:
            status = getattr(getattr(each, "status", None), "value", None)
            if status != "completed":
                raise StoreUnavailable(f"{self._where()} accepted a change and has not applied it yet ({status})")

    def _index_stamps(self) -> None:
        """Lets the server find stamps without looking at every payload."""
        from qdrant_client import models

        if self._indexed or self._connection.local:
            return
        self._change(
            "create_payload_index", self._collection, STAMP, field_schema=models.PayloadSchemaType.KEYWORD, wait=True
        )
        self._indexed = True


def datatype(params: Any) -> str:
    """How a vector's numbers are kept, of its parameters in a collection's description."""
    return getattr(params.datatype, "value", params.datatype) or "float32"


def majority() -> Any:
    """Read from most replicas: one that lags must not pass for the collection."""
    from qdrant_client import models

    return models.ReadConsistencyType.MAJORITY
