"""Facts and rows of a Milvus collection, as a server or Milvus Lite gives them."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import (
    BaseStore,
    Capabilities,
    CollectionInfo,
    Fence,
    Hits,
    ItemId,
    Metric,
    Page,
    Reading,
    StoreRejected,
    StoreUnavailable,
    Vectors,
)
from migrator.adapters.iterate import parts
from migrator.adapters.milvus import collection as like
from migrator.adapters.milvus.collection import Description, GivenKeys
from migrator.adapters.milvus.connection import Connection, Row, TooLarge
from migrator.adapters.milvus.lite import Known
from migrator.adapters.milvus.paging import SMALLEST, Keys
from migrator.adapters.vectors import as_queries, contents

if TYPE_CHECKING:
    from pymilvus import MilvusClient

STAMP = "_migrator"
PARTITION = "$partition"
"""In payloads, where the application chooses among partitions: the one that the row lies in. No field is called so."""
MESSAGE_BYTES = 16 << 20  # the server takes 64 MiB
ROWS = 10_000  # in one request
PAGE = 16_000  # the server gives 16,384
LITE_VERSION = "milvus_lite-"  # what the version of Milvus Lite begins with
LITE_PAGE = 100_000  # in Milvus Lite every page costs as much as the whole collection
LOADING = 3600  # seconds; Milvus Lite builds the index then if a kill left it without, a busy server lets one wait
METRICS: Mapping[str, Metric] = {"COSINE": "cosine", "IP": "ip", "L2": "l2"}
BYTES = {100, 102, 103, 105}
"""Types of vectors that the client gives as bytes: binary, float16, bfloat16, int8."""


class MilvusReader(BaseStore):
    """A collection of a Milvus, for reading. It shares `connection`, and releases it when it is closed."""

    def __init__(self, connection: Connection, collection: str, *, vector: str | None, write: bool) -> None:
        from pymilvus import DataType

        self._connection, self._write = connection, write
        self._fence: Fence | None = None
        found = self._describe(collection)
        self._collection = str(found["collection_name"])
        self._alias = collection if collection != self._collection else None
        self._written_name = self._collection
        self._dynamic = bool(found.get("enable_dynamic_field"))
        self._fields: dict[str, Row] = {field["name"]: field for field in found["fields"]}
        key = next((field for field in found["fields"] if field.get("is_primary")), None)
        if key is None:
            raise StoreRejected(f"collection {self._collection} has no primary key, by which its rows could be written")
        self._key = str(key["name"])
        self._keys = Keys(self._key, strings=key["type"] == DataType.VARCHAR)
        self._auto_id = bool(key.get("auto_id"))
        self._tried: GivenKeys | None = None
        functions = found.get("functions") or ()
        self._made = {name: function["name"] for function in functions for name in function["output_field_names"]}
        """Fields that a function of the collection fills, and which."""
        self._vector, self._dim = self._vector_field(vector)
        self._no_payload = {self._vector, STAMP, *self._made}
        if self._key == "id":  # which every template knows without it
            self._no_payload.add("id")
        if connection.lite:  # in Lite that is a matter of this process alone
            self._call("load_collection", self._collection, timeout=LOADING)
        state = self._call("get_load_state", self._collection)
        loaded = str(state["state"]).removeprefix("LoadState.")
        if loaded == "Loading":  # as after a restart of the server
            raise StoreUnavailable(f"collection {self._collection} is still being loaded")
        if loaded != "Loaded":
            raise StoreRejected(f"collection {self._collection} is not loaded: load it, then try again")
        self._must_be_whole()
        self._index = self._index_of_vector()
        if self._index.get("metric_type") not in METRICS:
            raise StoreRejected(
                f"{self._collection}.{self._vector} has the metric {self._index.get('metric_type')}, known are "
                f"{', '.join(METRICS)}"
            )
        self._metric = METRICS[self._index["metric_type"]]
        self._partial = self._can_update_fields()
        collection_id = self._collection
        self._known = Known(
            (lambda: connection.engine_of(collection_id)) if connection.lite else None, 4 * self._dim + 500
        )

    def _must_be_whole(self) -> None:
        """Rows of partitions that are not loaded cannot be seen, though the collection counts as loaded."""
        if self._connection.lite:
            return
        for partition in self._partitions():
            if partition is None:
                return
            state = self._call("get_load_state", self._collection, partition_name=partition)["state"]
            if str(state).removeprefix("LoadState.") != "Loaded":
                raise StoreRejected(
                    f"partition {partition} of collection {self._collection} is not loaded, so that its rows cannot be "
                    "read: load the whole collection, then try again"
                )

    def _index_of_vector(self) -> Row:
        for name in self._call("list_indexes", self._collection):
            found: Row | None = self._call("describe_index", self._collection, name)
            if found and found.get("field_name") == self._vector:
                return found
        raise StoreRejected(f"{self._collection}.{self._vector} has no index: create one, then try again")

    def _describe(self, collection: str) -> Row:
        def call(client: MilvusClient) -> Row:
            if not client.has_collection(collection, timeout=self._connection.timeout):
                database = self._connection.database
                where = "" if database == "default" else f" in database {database!r}"  # or there is no such database
                raise StoreRejected(
                    f"{self._connection.where} has no collection or alias {collection!r}{where}: "
                    "correct `collection` of the store"
                )
            found: Row = client.describe_collection(collection, timeout=self._connection.timeout)
            return found

        return self._connection.ask(call)

    def _vector_field(self, wanted: str | None) -> tuple[str, int]:
        from pymilvus import DataType

        kinds = (
            DataType.FLOAT_VECTOR, DataType.BINARY_VECTOR, DataType.FLOAT16_VECTOR, DataType.BFLOAT16_VECTOR,
            DataType.SPARSE_FLOAT_VECTOR, DataType.INT8_VECTOR,
        )  # fmt: skip
        vectors = {name: field for name, field in self._fields.items() if field["type"] in kinds}
        names = ", ".join(vectors) or "none"
        where = f"collection {self._collection}"
        if wanted is None and len(vectors) != 1:
            raise StoreRejected(f"{where} has the vector fields {names}: name one with `vector`")
        name = next(iter(vectors)) if wanted is None else wanted
        if name not in vectors:
            raise StoreRejected(f"{where} has no vector field {name!r}, but {names}: correct `vector` of the store")
        if vectors[name]["type"] != DataType.FLOAT_VECTOR:
            kind = DataType(vectors[name]["type"]).name
            raise StoreRejected(f"{where}: {name} is a {kind}: only FLOAT_VECTOR can be migrated")
        if name in self._made:
            raise StoreRejected(
                f"{where}: {name} is filled by the function {self._made[name]} of the collection, which nobody else "
                "may do: name a field of your own vectors with `vector`"
            )
        return name, int(vectors[name]["params"]["dim"])

    def _can_update_fields(self) -> bool:
        """Milvus changes single fields of a row from 2.6 on, Milvus Lite from 3 on."""
        version = self._version()
        digits = version.removeprefix(LITE_VERSION).removeprefix("v").split("-")[0].split(".")
        return self._connection.lite or [int(part) for part in digits[:2] if part.isdigit()] >= [2, 6]

    def _version(self) -> str:
        return str(self._connection.call("get_server_version"))

    def _call(self, method: str, *arguments: Any, timeout: float | None = None, **options: Any) -> Any:
        """Calls a method of the client by its name."""
        self._must_be_open()
        return self._connection.call(method, *arguments, timeout=timeout, **options)

    # -- facts ----------------------------------------------------------------------------------------------------

    @cached_property
    def capabilities(self) -> Capabilities:
        """What this server, and this collection, allow."""
        lite = self._connection.lite
        notes = []
        if not self._partial:
            notes.append(
                "this server writes whole rows (2.6 changes single fields): in place, what an application deletes or "
                "changes within about 0.6 s of a write can be lost; stop its writes during runs, or use a shadow"
            )
        if lite:
            notes.append("Milvus Lite is open in one process at a time: stop the application for each run")
        if self._made:
            notes.append(
                f"{', '.join(sorted(self._made))}: filled by functions of the collection, which fill them again in a "
                "shadow"
            )
        notes += self._notes_on_aliases() + self._notes_on_keys()
        return Capabilities(
            update_in_place=self._in_place_refusal() is None,
            in_place_refusal=self._in_place_refusal(),
            visible="at_once",
            stamps=self._dynamic,
            concurrent_writers=not lite,
            exact_vectors=True,
            normalises=False,
            partial_update=self._partial,
            aliases=True,
            notes=tuple(notes),
        )

    def _notes_on_aliases(self) -> list[str]:
        others = [alias for alias in self._aliases() if alias != self._alias]
        if not others:
            return []
        which = f"{', '.join(others)}: alias{'es' if len(others) > 1 else ''} of this collection"
        return [f"{which} that a shadow's cutover does not move: move {'them' if len(others) > 1 else 'it'} yourself"]

    def _notes_on_keys(self) -> list[str]:
        if not self._auto_id:
            return []
        notes = ["keys are made by the server (auto_id); a scratch collection showed what it does with given ones"]
        if self._connection.keep_keys:
            notes.append(
                "auto_id_in_shadow is keep_keys: a shadow makes no keys, so the application gives every row that it "
                "writes there the key itself, from the canary stage on (of a row written to both collections, the key "
                "that the insert into the old one answers)"
            )
        if self._given_keys.written_by is None:
            notes.append(
                "rows cannot be written back under their keys: what the application writes to a shadow after the "
                "cutover is not brought back by a rollback, which then keeps the shadow"
            )
        return notes

    @property
    def _given_keys(self) -> GivenKeys:
        """What the server does with given keys, tried out once."""
        if self._tried is None:
            self._tried = self._try_given_keys()
        return self._tried

    def _try_given_keys(self, *, property_: bool = False) -> GivenKeys:
        return like.try_given_keys(self._call, self._description(), partial=self._partial, property_=property_)

    def _in_place_refusal(self) -> str | None:
        if not self._auto_id or self._given_keys.upsert_keeps:
            return None
        return (
            "makes its own keys (auto_id), and this server writes no row under a given key: "
            "set rollout.strategy to shadow"
        )

    def _description(self) -> Description:
        return like.describe(self._call, self._collection)

    def describe(self) -> CollectionInfo:
        """Facts of the collection as it is now. Rows with one key inserted twice count twice here."""
        from pymilvus import DataType

        schema = {
            name: DataType(field["type"]).name for name, field in self._fields.items() if name not in self._no_payload
        }
        if self._dynamic:
            rows = self._query("", fields=["*"], limit=100)
            for row in rows:
                for name, value in row.items():
                    if name not in self._no_payload:
                        schema.setdefault(name, type(value).__name__)
        where = (
            self._connection.where if self._connection.lite else f"{self._connection.where}/{self._connection.database}"
        )
        parameters = " ".join(f"{name}={value}" for name, value in sorted(like.index_parameters(self._index).items()))
        return CollectionInfo(
            name=f"milvus:{where}/{self._collection}",
            collection_id=self._collection,
            dim=self._dim,
            metric=self._metric,
            count=self._count_rows(),
            index=f"{self._index['index_type']} {parameters}".strip(),
            server=f"milvus {self._version().removeprefix('v')}",
            schema=schema,
            alias=self._alias,
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def _query(
        self,
        condition: str,
        *,
        fields: list[str],
        limit: int | None = None,
        ordered: bool = False,
        partition: str | None = None,
    ) -> list[Row]:
        """Rows by a condition. Strong, but for `ordered` pages on a server."""
        more: Row = {} if limit is None else {"limit": limit}
        if partition is not None:
            more["partition_names"] = [partition]
        if ordered:
            more["iterator"] = "True"
        found = self._call(
            "query",
            self._collection,
            filter=condition,
            output_fields=fields,
            consistency_level="Strong",
            strict_float32=True,
            **more,
        )
        return list(found)

    def _barrier(self) -> None:
        """Waits until the pages that follow show everything that has been written up to now."""
        if not self._connection.lite:
            self._query(f"{self._key} in [{self._keys.literal('' if self._keys.strings else 0)}]", fields=[self._key])

    def _pages(
        self, condition: str, after: ItemId | None, up_to: ItemId | None, limit: int, fields: list[str], size: int
    ) -> Iterator[list[Row]]:
        """Up to `limit` rows in the order of the keys, in pages of `size`, as they are when the first is asked for."""
        self._barrier()
        yield from self._keys.pages(self._query, condition, after, up_to, limit, fields, size)

    def _key_list(self, condition: str, after: ItemId | None, up_to: ItemId | None, limit: int) -> list[ItemId]:
        size = LITE_PAGE if self._connection.lite else PAGE
        pages = self._pages(condition, after, up_to, limit, [self._key], size)
        return [row[self._key] for page in pages for row in page]

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` keys in order."""
        with self._known.held() as known:
            if known and self._open:
                if self._known.keys is None:
                    self._known.keys = self._key_list("", None, None, sys.maxsize)
                return self._known.between(after, up_to, limit)
        return self._key_list("", after, up_to, limit)

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` rows in order."""
        with self._known.held() as known:
            if known or len(self._partitions()) > 1:
                return self.read(self.scan_ids(after=after, up_to=up_to, limit=limit))
        pages = self._pages("", after, up_to, limit, ["*"], self._fitting)
        rows = {row[self._key]: row for page in pages for row in page}
        return self._reading(list(rows), rows, vectors=True, payload=True).page()

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Keys of rows that do not carry the stamp."""
        self._must_keep_stamps()
        if not self._partial:
            return self._key_list(
                f"(not (exists {STAMP})) or ({STAMP} != {self._keys.literal(stamp)})", after, None, limit
            )
        found = (item for item, carried in self._stamps(after) if carried != stamp)
        return list(itertools.islice(found, max(limit, 0)))

    def _stamps(self, after: ItemId | None) -> Iterator[tuple[ItemId, str | None]]:
        """Every key beyond `after`, in order, with the stamp that holds."""
        while True:
            with self._known.held() as known:
                if not known:
                    break
                keys = self.scan_ids(after=after, limit=LITE_PAGE)
                self.read_stamps(self._known.unread(keys))
                stamps = [(item, self._known.stamps.get(item)) for item in keys]
            yield from stamps
            if len(keys) < LITE_PAGE:
                return
            after = keys[-1]
        for page in self._pages("", after, None, sys.maxsize, [self._key, self._vector, STAMP], self._fitting):
            yield from ((row[self._key], self._stamp_of(row)) for row in page)

    def _stamp_of(self, row: Row) -> str | None:
        value: str | None = row.get(STAMP)
        if value is None or not self._partial:
            return value
        stamp, _, kept = value.rpartition(":")
        vector = row[self._vector]
        return stamp if vector is not None and kept == checksum(vector) else None

    def _as_value(self, stamp: str | None, vector: Vectors) -> str | None:
        return stamp if stamp is None or not self._partial else f"{stamp}:{checksum(vector)}"

    def _must_keep_stamps(self) -> None:
        if not self._dynamic:
            raise StoreRejected(f"collection {self._collection} has no dynamic field to keep stamps in")

    @property
    def _fitting(self) -> int:
        """Rows that fit into one request or one answer."""
        return max(1, min(ROWS, MESSAGE_BYTES // (4 * self._dim + 500)))

    def _rows(self, ids: Sequence[ItemId], fields: list[str]) -> dict[ItemId, Row]:
        """Rows by key, strongly consistent. A row whose key is of the wrong type or size cannot exist."""
        possible = [item for item in ids if self._keys.possible(item)]
        rows: dict[ItemId, Row] = {}
        partitions = self._partitions() if possible else []
        if not possible:
            return rows
        listed = ", ".join(self._keys.literal(item) for item in possible if item != SMALLEST)
        conditions = [f"{self._key} in [{listed}]"] if listed else []
        if SMALLEST in possible:  # the language cannot say it
            conditions.append(f"{self._key} < {SMALLEST + 1}")
        try:
            for partition in partitions:
                chosen = {} if partition is None else {PARTITION: partition}
                for condition in conditions:
                    for row in self._query(condition, fields=fields, partition=partition):
                        rows[row[self._key]] = {**row, **chosen}
        except TooLarge:
            if len(possible) == 1:
                raise
            half = len(possible) // 2
            return {**self._rows(possible[:half], fields), **self._rows(possible[half:], fields)}
        return rows

    def _partitions(self) -> Sequence[str | None]:
        """The partitions that the application chooses among; None alone if it has no choice, or does not make one.

        What is written without a word on the partition goes to the default one, beside the row that lies elsewhere.
        """
        if any(field.get("is_partition_key") for field in self._fields.values()):
            return [None]
        names = self._call("list_partitions", self._collection)
        return [None] if len(names) == 1 else sorted(names)

    def _read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Reading:
        """The rows as they were written last."""
        fields = ["*"] if payload else [self._key]
        if not payload and (vectors or (self._partial and self._dynamic)):
            fields.append(self._vector)
        if not payload and self._dynamic:
            fields.append(STAMP)
        rows: dict[ItemId, Row] = {}
        with self._known.held() as known:
            for part in parts(ids, self._fitting):
                rows.update(self._rows(part, fields))
            self._must_be_open()
            page = self._reading([item for item in ids if item in rows], rows, vectors=vectors, payload=payload)
            if known:
                stamps = dict(zip(page.ids, page.stamps, strict=True))
                self._known.saw(stamps, contents(page.page()) if vectors and payload else {})
        return page

    def _reading(self, ids: list[ItemId], rows: Mapping[ItemId, Row], *, vectors: bool, payload: bool) -> Reading:
        stacked: Vectors | None = None
        if vectors:
            nothing = np.zeros(self._dim, np.float32)  # Milvus Lite shows a vector that is null so, too
            found = [rows[item][self._vector] for item in ids]
            found = [nothing if vector is None else vector for vector in found]
            stacked = np.array(found, np.float32).reshape(len(ids), self._dim)
        return Reading(
            ids,
            stacked,
            [self._payload(rows[item]) for item in ids] if payload else None,
            [self._stamp_of(rows[item]) for item in ids],
        )

    def _payload(self, row: Row) -> Row:
        fields = self._fields
        return {
            name: plain_value(value, fields.get(name)) for name, value in row.items() if name not in self._no_payload
        }

    def count(self, *, stamp: str | None = None) -> int:
        """Exact number of keys; with `stamp`, of those that carry it.

        The keys are gone through, for `count(*)` counts rows: a key that was inserted twice on a server lies in two of
        them, and so, now and then, does one of Milvus Lite after a kill.
        """
        if stamp is not None:
            self._must_keep_stamps()
            if self._partial:
                return sum(carried == stamp for _, carried in self._stamps(None))
            return len(self._key_list(f"{STAMP} == {self._keys.literal(stamp)}", None, None, sys.maxsize))
        return len(self.scan_ids(after=None, limit=sys.maxsize))

    def _count_rows(self) -> int:
        (row,) = self._query("", fields=["count(*)"])
        return int(row["count(*)"])

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest rows to each of `vectors` (n, dim). `exact` reads all of them and compares."""
        queries = as_queries(vectors, self._dim, k)
        if exact:
            return self._search_all(queries, k)
        ids: list[list[ItemId]] = []
        scores: list[list[float]] = []
        sign = -1.0 if self._metric == "l2" else 1.0
        for start in range(0, len(queries), 1000):
            block = list(queries[start : start + 1000])
            answers = self._call(
                "search",
                self._collection,
                data=block,
                anns_field=self._vector,
                limit=min(k, 16_384),
                search_params={
                    "params": {"ef": min(max(k, 64), 32_768)} if self._index["index_type"] == "HNSW" else {}
                },
                output_fields=[self._key],
                consistency_level="Strong",
            )
            for answer in answers:
                ids.append([hit["entity"].get(self._key, hit.get("id")) for hit in answer])
                scores.append([sign * float(hit["distance"]) for hit in answer])
        return Hits(ids, scores)

    def _search_all(self, queries: Vectors, k: int) -> Hits:
        best: list[list[tuple[float, ItemId]]] = [[] for _ in queries]
        after: ItemId | None = None
        while page := self.scan(after=after, limit=ROWS):
            scores = self._scores(queries, page.vectors)
            for row, found in enumerate(best):
                found += zip(scores[row].tolist(), page.ids, strict=True)
                found.sort(key=lambda pair: -pair[0])
                del found[k:]
            after = page.ids[-1]
        return Hits([[item for _, item in found] for found in best], [[score for score, _ in found] for found in best])

    def _scores(self, queries: Vectors, vectors: Vectors) -> Vectors:
        if self._metric == "l2":
            difference = queries[:, None, :] - vectors[None, :, :]
            squared: Vectors = -np.einsum("qnd,qnd->qn", difference, difference)
            return squared
        products: Vectors = queries @ vectors.T
        if self._metric == "cosine":
            lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)[None, :]
            products /= np.where(lengths == 0, 1, lengths)
        return products

    def _aliases(self) -> list[str]:
        aliases = self._describe(self._collection).get("aliases")  # Milvus Lite tells none
        if not aliases and self._connection.database == "default":  # 2.3 lists those of no other
            aliases = self._call("list_aliases", self._collection)["aliases"]
        return sorted(aliases or ())


def checksum(vector: Any) -> str:
    """Of a vector, beside its stamp: one of another vector is void."""
    return hashlib.blake2b(np.ascontiguousarray(vector, "<f4").tobytes(), digest_size=8).hexdigest()


def plain_value(value: Any, field: Row | None = None) -> Any:
    """Of the client's types, plain ones, in the form in which it takes them back."""
    if isinstance(value, (str, int, float, bool, bytes)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {name: plain_value(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    plain = [plain_value(inner) for inner in value]
    # A vector of bytes comes as a list of one, and goes as what is in it.
    return plain[0] if field and field["type"] in BYTES and len(plain) == 1 and isinstance(plain[0], bytes) else plain
