"""Milvus: a server over gRPC, or Milvus Lite, a local file that one process at a time may open.

Reads come in two kinds, for on a server a page in the order of the keys (`iterator`) is served from whatever is there,
however strong a consistency is asked for. So a strong query goes before such pages, and items are read by key, which
is strong by itself.

Where the server can change single fields, that is used. But then an application's write need not replace the whole
row either (in Milvus Lite no upsert does), and a stamp may outlive the vector that it was written with. So there a
stamp carries the checksum of its vector and holds as long as that fits. Elsewhere whole rows are written anew, with
the row as it was right before, and an application's write takes the stamp away.

What is known of a Milvus Lite without asking it again is in `migrator.adapters.milvus_known`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from migrator.adapters import milvus_collection as like
from migrator.adapters.base import (
    Capabilities,
    CollectionInfo,
    Fence,
    Hits,
    ItemId,
    Metric,
    Page,
    StoreBusy,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    order_key,
    same_value,
)
from migrator.adapters.milvus_collection import Description, GivenKeys
from migrator.adapters.milvus_known import Known
from migrator.adapters.vectors import Contents, as_batch, contents, one_line, unusable

if TYPE_CHECKING:
    from pymilvus import MilvusClient

T = TypeVar("T")
Row = dict[str, Any]

STAMP = "_migrator"
PARTITION = "$partition"
"""In payloads, where the application chooses among partitions: the one that the row lies in. No field is called so."""
KEYS = ("kind", "uri", "token", "database", "collection", "vector", "timeout", "auto_id_in_shadow")
KEEP_KEYS = "keep_keys"
MESSAGE_BYTES = 16 << 20  # the server takes 64 MiB
ROWS = 10_000  # in one request
WHOLE_ROWS = 5_000  # read and at once written anew: fewer take longer, more leave others more time in between
PAGE = 16_000  # the server gives 16,384
LITE_VERSION = "milvus_lite-"  # what the version of Milvus Lite begins with
LITE_PAGE = 100_000  # in Milvus Lite every page costs as much as the whole collection
LOADING = 3600  # seconds; Milvus Lite builds the index then if a kill left it without, a busy server lets one wait
METRICS: Mapping[str, Metric] = {"COSINE": "cosine", "IP": "ip", "L2": "l2"}
PASSING = {1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 500, 501, 502, 503, 504, 505, 600, 901, 902, 903, 904}
"""Codes of a server that is starting, overloaded or moving things about."""
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
"""In the server's language; it knows no more of them, and takes other characters as they are."""
SMALLEST, LARGEST = -(2**63), 2**63 - 1
BYTES = {100, 102, 103, 105}
"""Types of vectors that the client gives as bytes: binary, float16, bfloat16, int8."""


class _NoCollection(StoreRejected):
    """No collection or alias of that name."""


class _TooLarge(StoreRejected):
    """More in one message than the server takes or gives."""


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


class Connection:
    """A client that several stores share. The last one closes it."""

    _lite: dict[str, int] = {}  # noqa: RUF012 - how many connections this process has to each file
    _lite_lock = threading.Lock()

    def __init__(self, config: Mapping[str, Any]) -> None:
        from pymilvus import MilvusClient

        # They log every error, also those that are expected, with a traceback.
        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        uri, self.database = str(config["uri"]), str(config.get("database", "default"))
        self.lite = "://" not in uri
        self.timeout = float(config.get("timeout", 30))
        self.keep_keys = config.get("auto_id_in_shadow") == KEEP_KEYS
        self.where = os.path.realpath(uri) if self.lite else uri.split("@")[-1].rstrip("/")
        self._users = 1
        if self.lite and not Path(uri).exists():
            raise StoreRejected(f"{self.where} does not exist: correct `uri` of the store")
        if self.lite and not Path(uri, "collections").is_dir():  # opening it would make it one
            raise StoreRejected(f"{self.where} was not made by Milvus Lite 3: correct `uri` of the store")
        given: Row = {"uri": self.where if self.lite else uri, "timeout": self.timeout}
        if config.get("token"):
            given["token"] = config["token"]
        if not self.lite and self.database != "default":
            given["db_name"] = self.database
        with self._lite_lock:
            if self.lite:
                self._lite[self.where] = self._lite.get(self.where, 0) + 1
        try:
            self.client: MilvusClient = self._translated(lambda: MilvusClient(**given))
        except BaseException:
            self._release()
            raise

    def shared(self) -> Connection:
        """This connection, for one more store."""
        self._users += 1
        return self

    def release(self) -> None:
        """One store less."""
        self._users -= 1
        if self._users == 0:
            self.client.close()
            self._release()

    def _release(self) -> None:
        """Lite's server in this process holds the file until it is stopped."""
        if not self.lite:
            return
        with self._lite_lock:
            self._lite[self.where] -= 1
            if self._lite[self.where] == 0:
                from milvus_lite import server_manager_instance

                server_manager_instance.release_server(self.where)

    def engine_of(self, collection: str) -> Any:
        """The collection in the engine of Milvus Lite, which runs in this process; None if there is none."""
        from milvus_lite import MilvusLiteError, server_manager_instance

        _, engine, _ = server_manager_instance._servers.get(self.where, (None, None, None))
        try:
            return None if engine is None else engine.get_collection(collection)
        except MilvusLiteError:
            return None

    def ask(self, call: Callable[[MilvusClient], T]) -> T:
        """Makes a call, with the client's exceptions in this package's words."""
        return self._translated(lambda: call(self.client))

    def _translated(self, call: Callable[[], T]) -> T:
        import grpc
        from pymilvus.exceptions import ConnectionConfigException, MilvusException

        try:
            return call()
        except ConnectionConfigException as error:
            if "Open local milvus failed" in str(error):
                raise StoreBusy(f"{self.where} is open in another process: stop it, then again") from error
            raise StoreRejected(f"{self.where} cannot be opened: {one_line(error)}") from error
        except MilvusException as error:
            raise self._of_code(error) from error
        except grpc.RpcError as error:
            raise self._of_rpc(error) from error
        except (TypeError, ValueError) as error:
            raise StoreRejected(f"{self.where} refused: {one_line(error)}") from error
        except OSError as error:
            raise StoreUnavailable(f"{self.where} did not answer: {one_line(error)}") from error

    def _of_code(self, error: Any) -> Exception:
        import grpc

        cause = error.__cause__  # the client itself calls it a failed connection
        if isinstance(cause, grpc.RpcError) and cause.code().name in (*REFUSED, "UNIMPLEMENTED"):
            return self._of_rpc(cause)
        said = one_line(getattr(error, "message", "") or error)
        code = error.code
        if code == 100 and "collection" in said.lower():
            return _NoCollection(f"{self.where}: {said}: correct `collection` of the store")
        if code == 101:  # it was when it was opened: the server may have been restarted
            return StoreUnavailable(f"{self.where}: the collection is not loaded any more, or not yet again: {said}")
        if "maxOutputSize" in said or "exceed the limit size" in said:
            return _TooLarge(f"{self.where}: {said}")
        known = isinstance(code, int)
        if not known or "Retry timeout" in said or "rate limit" in said or (not self.lite and code in PASSING):
            return StoreUnavailable(f"{self.where} did not answer: {said}")
        return StoreRejected(f"{self.where} refused (code {code}): {said}")

    def _of_rpc(self, error: Any) -> Exception:
        import grpc

        code, said = error.code(), one_line(error.details() or "")
        if code.name in REFUSED:
            return StoreRejected(f"{self.where} refuses these credentials: correct `token`")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in said:
            return _TooLarge(f"{self.where}: {said}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return StoreRejected(f"{self.where} is no Milvus, or too old for this client: {said}")
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return StoreRejected(f"{self.where} cannot do this ({code.name}): {said}")
        return StoreUnavailable(f"{self.where} did not answer ({code.name}): {said}")


class MilvusStore:
    """One collection of a Milvus. It shares `connection`, and releases it when it is closed."""

    def __init__(self, connection: Connection, collection: str, *, vector: str | None, write: bool) -> None:
        from pymilvus import DataType

        self._connection, self._write = connection, write
        self._open = True
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
        self._strings = key["type"] == DataType.VARCHAR
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
            self._ask(lambda client: client.load_collection(self._collection, timeout=LOADING))
        state = self._ask(lambda client: client.get_load_state(self._collection, timeout=connection.timeout))
        loaded = str(state["state"]).removeprefix("LoadState.")
        if loaded == "Loading":  # as after a restart of the server
            raise StoreUnavailable(f"collection {self._collection} is still being loaded")
        if loaded != "Loaded":
            raise StoreRejected(f"collection {self._collection} is not loaded: load it, then again")
        self._must_be_whole()
        self._index = self._ask(lambda client: _index_of(client, self._collection, self._vector, connection.timeout))
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
                    "read: load the whole collection, then again"
                )

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
        timeout = self._connection.timeout
        return str(self._connection.ask(lambda client: client.get_server_version(timeout=timeout)))

    def _ask(self, call: Callable[[MilvusClient], T]) -> T:
        if not self._open:
            raise StoreRejected(f"{self._collection} was closed")
        return self._connection.ask(call)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the client by its name."""
        return self._ask(
            lambda client: getattr(client, method)(*arguments, timeout=self._connection.timeout, **options)
        )

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
        found = self._ask(
            lambda client: client.query(
                self._collection,
                filter=condition,
                output_fields=fields,
                consistency_level="Strong",
                strict_float32=True,
                timeout=self._connection.timeout,
                **more,
            )
        )
        return list(found)

    def _barrier(self) -> None:
        """Waits until the pages that follow show everything that has been written up to now."""
        if not self._connection.lite:
            self._query(f"{self._key} in [{self._literal('' if self._strings else 0)}]", fields=[self._key])

    def _literal(self, item: ItemId) -> str:
        if isinstance(item, int):
            return str(item)
        return '"' + "".join(ESCAPES.get(character, character) for character in item) + '"'

    def _beyond(self, after: ItemId | None) -> str | None:
        """The condition for keys beyond `after`; None if there can be none."""
        if after is None:
            return "" if not self._strings else f'{self._key} >= ""'
        if isinstance(after, str) != self._strings:
            # All integers come before all strings.
            return None if isinstance(after, str) else f'{self._key} >= ""'
        if isinstance(after, int):
            if after >= LARGEST:
                return None
            # The language cannot say the smallest integer.
            return "" if after < SMALLEST else f"{self._key} >= {after + 1}"
        return f"{self._key} > {self._literal(after)}"

    def _up_to(self, up_to: ItemId | None) -> str | None:
        """The condition for keys not beyond `up_to`; None if there can be none."""
        if up_to is None:
            return ""
        if isinstance(up_to, str) != self._strings:
            return "" if isinstance(up_to, str) else None
        if isinstance(up_to, int):
            if up_to < SMALLEST:
                return None
            return "" if up_to >= LARGEST else f"{self._key} < {up_to + 1}"
        return f"{self._key} <= {self._literal(up_to)}"

    def _pages(
        self, condition: str, after: ItemId | None, up_to: ItemId | None, limit: int, fields: list[str], size: int
    ) -> Iterator[list[Row]]:
        """Up to `limit` rows in the order of the keys, in pages of `size`, as they are when the first is asked for."""
        self._barrier()
        inside = self._up_to(up_to)
        while limit > 0 and inside is not None and (beyond := self._beyond(after)) is not None:
            size = min(size, limit)
            both = " and ".join(f"({part})" for part in (beyond, inside, condition) if part)
            try:
                page = self._query(both, fields=fields, limit=size, ordered=True)
            except _TooLarge:
                if size == 1:
                    raise
                size //= 2
                continue
            rows = {row[self._key]: row for row in page}  # a key may lie in two rows
            whole = len(page) == size
            page = sorted(rows.values(), key=lambda row: order_key(row[self._key]))
            if page:
                yield page
            if not whole:
                break
            limit -= len(page)
            after = page[-1][self._key]

    def _keys(self, condition: str, after: ItemId | None, up_to: ItemId | None, limit: int) -> list[ItemId]:
        size = LITE_PAGE if self._connection.lite else PAGE
        pages = self._pages(condition, after, up_to, limit, [self._key], size)
        return [row[self._key] for page in pages for row in page]

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` keys in order."""
        with self._known.held() as known:
            if known and self._open:
                if self._known.keys is None:
                    self._known.keys = self._keys("", None, None, sys.maxsize)
                return self._known.between(after, up_to, limit)
        return self._keys("", after, up_to, limit)

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` rows in order."""
        with self._known.held() as known:
            if known or len(self._partitions()) > 1:
                return self.read(self.scan_ids(after=after, up_to=up_to, limit=limit), vectors=True, payload=True)
        pages = self._pages("", after, up_to, limit, ["*"], self._fitting)
        rows = {row[self._key]: row for page in pages for row in page}
        return self._page(list(rows), rows, vectors=True, payload=True)

    def unstamped(self, stamp: str, *, after: ItemId | None, limit: int) -> list[ItemId]:
        """Keys of rows that do not carry the stamp."""
        self._must_keep_stamps()
        if not self._partial:
            return self._keys(f"(not (exists {STAMP})) or ({STAMP} != {self._literal(stamp)})", after, None, limit)
        found = (item for item, carried in self._stamps(after) if carried != stamp)
        return list(itertools.islice(found, max(limit, 0)))

    def _stamps(self, after: ItemId | None) -> Iterator[tuple[ItemId, str | None]]:
        """Every key beyond `after`, in order, with the stamp that holds."""
        while True:
            with self._known.held() as known:
                if not known:
                    break
                keys = self.scan_ids(after=after, limit=LITE_PAGE)
                self.read(self._known.unread(keys), vectors=False, payload=False)
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
        stamp, _, checksum = value.rpartition(":")
        vector = row[self._vector]
        return stamp if vector is not None and checksum == _checksum(vector) else None

    def _as_value(self, stamp: str | None, vector: Vectors) -> str | None:
        return stamp if stamp is None or not self._partial else f"{stamp}:{_checksum(vector)}"

    def _must_keep_stamps(self) -> None:
        if not self._dynamic:
            raise StoreRejected(f"collection {self._collection} has no dynamic field to keep stamps in")

    @property
    def _fitting(self) -> int:
        """Rows that fit into one request or one answer."""
        return max(1, min(ROWS, MESSAGE_BYTES // (4 * self._dim + 500)))

    def _parts(self, ids: Sequence[ItemId], most: int = ROWS) -> Iterator[list[ItemId]]:
        size = min(self._fitting, most)
        for start in range(0, len(ids), size):
            yield list(ids[start : start + size])

    def _rows(self, ids: Sequence[ItemId], fields: list[str]) -> dict[ItemId, Row]:
        """Rows by key, strongly consistent. A row whose key is of the wrong type or size cannot exist."""
        possible = [item for item in ids if isinstance(item, str) == self._strings and self._fits(item)]
        rows: dict[ItemId, Row] = {}
        partitions = self._partitions() if possible else []
        if not possible:
            return rows
        listed = ", ".join(self._literal(item) for item in possible if item != SMALLEST)
        conditions = [f"{self._key} in [{listed}]"] if listed else []
        if SMALLEST in possible:  # the language cannot say it
            conditions.append(f"{self._key} < {SMALLEST + 1}")
        try:
            for partition in partitions:
                chosen = {} if partition is None else {PARTITION: partition}
                for condition in conditions:
                    for row in self._query(condition, fields=fields, partition=partition):
                        rows[row[self._key]] = {**row, **chosen}
        except _TooLarge:
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
        names = self._ask(lambda client: client.list_partitions(self._collection, timeout=self._connection.timeout))
        return [None] if len(names) == 1 else sorted(names)

    def _fits(self, item: ItemId) -> bool:
        return isinstance(item, str) or SMALLEST <= item <= LARGEST

    def read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Page:
        """The rows as they were written last."""
        fields = ["*"] if payload else [self._key]
        if not payload and (vectors or (self._partial and self._dynamic)):
            fields.append(self._vector)
        if not payload and self._dynamic:
            fields.append(STAMP)
        rows: dict[ItemId, Row] = {}
        with self._known.held() as known:
            for part in self._parts(ids):
                rows.update(self._rows(part, fields))
            if not self._open:
                raise StoreRejected(f"{self._collection} was closed")
            page = self._page([item for item in ids if item in rows], rows, vectors=vectors, payload=payload)
            if known:
                stamps = dict(zip(page.ids, page.stamps, strict=True))
                self._known.saw(stamps, contents(page) if vectors and payload else {})
        return page

    def _page(self, ids: list[ItemId], rows: Mapping[ItemId, Row], *, vectors: bool, payload: bool) -> Page:
        stacked: Vectors | None = None
        if vectors:
            nothing = np.zeros(self._dim, np.float32)  # Milvus Lite shows a vector that is null so, too
            found = [rows[item][self._vector] for item in ids]
            found = [nothing if vector is None else vector for vector in found]
            stacked = np.array(found, np.float32).reshape(len(ids), self._dim)
        return Page(
            ids,
            stacked,
            [self._payload(rows[item]) for item in ids] if payload else None,
            [self._stamp_of(rows[item]) for item in ids],
        )

    def _payload(self, row: Row) -> Row:
        fields = self._fields
        return {name: _plain(value, fields.get(name)) for name, value in row.items() if name not in self._no_payload}

    def count(self, *, stamp: str | None = None) -> int:
        """Exact number of keys; with `stamp`, of those that carry it.

        The keys are gone through, for `count(*)` counts rows: a key that was inserted twice on a server lies in two of
        them, and so, now and then, does one of Milvus Lite after a kill.
        """
        if stamp is not None:
            self._must_keep_stamps()
            if self._partial:
                return sum(carried == stamp for _, carried in self._stamps(None))
            return len(self._keys(f"{STAMP} == {self._literal(stamp)}", None, None, sys.maxsize))
        return len(self.scan_ids(after=None, limit=sys.maxsize))

    def _count_rows(self) -> int:
        (row,) = self._query("", fields=["count(*)"])
        return int(row["count(*)"])

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """`n` distinct keys in random order."""
        everything: list[ItemId] = []
        while more := self.scan_ids(after=everything[-1] if everything else None, limit=200_000):
            everything += more
        chosen = np.random.default_rng(seed).choice(len(everything), min(max(n, 0), len(everything)), replace=False)
        return [everything[row] for row in chosen.tolist()]

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest rows to each of `vectors` (n, dim). `exact` reads all of them and compares."""
        queries = as_batch(vectors, self._dim)
        if k < 1 or not np.isfinite(queries).all():
            raise StoreRejected(f"a search needs finite vectors and at least one answer, k is {k}")
        if exact:
            return self._search_all(queries, k)
        ids: list[list[ItemId]] = []
        scores: list[list[float]] = []
        sign = -1.0 if self._metric == "l2" else 1.0
        for start in range(0, len(queries), 1000):
            block = list(queries[start : start + 1000])
            answers = self._ask(
                lambda client, block=block: client.search(  # type: ignore[misc]
                    self._collection,
                    data=block,
                    anns_field=self._vector,
                    limit=min(k, 16_384),
                    search_params={
                        "params": {"ef": min(max(k, 64), 32_768)} if self._index["index_type"] == "HNSW" else {}
                    },
                    output_fields=[self._key],
                    consistency_level="Strong",
                    timeout=self._connection.timeout,
                )
            )
            for answer in answers:
                ids.append([hit["entity"].get(self._key, hit.get("id")) for hit in answer])
                scores.append([sign * float(hit["distance"]) for hit in answer])
        return Hits(ids, scores)

    def _search_all(self, queries: Vectors, k: int) -> Hits:
        best: list[list[tuple[float, ItemId]]] = [[] for _ in queries]
        after: ItemId | None = None
        while page := self.scan(after=after, limit=ROWS):
            assert page.vectors is not None
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

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Writes the vectors, as single fields or as whole rows, and looks afterwards what became of them."""
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
        for part in self._parts(ids, ROWS if self._partial else WHOLE_ROWS):
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
        lost = set(deleted)
        return WriteReport(written, deleted, {item: why for item, why in rejected.items() if item not in lost}, changed)

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
            found = {} if before is None else contents(self._page(list(rows), rows, vectors=True, payload=True))
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
            changed = {**{name: _plain(value, self._fields.get(name)) for name, value in kept.items()}, **changed}
        if self._dynamic and (stamp is not None or self._partial):  # a single field is emptied, not taken away
            changed[STAMP] = self._as_value(stamp, vector)
        return changed

    def _upsert(self, rows: list[Row], *, partial: bool) -> dict[ItemId, str]:
        more: Row = {"partial_update": True} if partial else {}
        return self._send("upsert", rows, **more)

    def _send(self, how: Literal["upsert", "insert"], rows: list[Row], **more: Any) -> dict[ItemId, str]:
        """Writes rows; halves a batch that is refused, down to the row that is to blame."""
        refused: dict[ItemId, str] = {}
        by_partition: dict[str, list[Row]] = {}
        for row in rows:
            by_partition.setdefault(row.get(PARTITION, ""), []).append(row)
        for partition, some in by_partition.items():
            stored = [{name: value for name, value in row.items() if name != PARTITION} for row in some]
            self._may_change()
            try:
                self._ask(
                    lambda client, stored=stored, partition=partition: getattr(client, how)(  # type: ignore[misc]
                        self._written_name,
                        stored,
                        partition_name=partition,
                        timeout=self._connection.timeout,
                        **more,
                    )
                )
            except _NoCollection:  # no row is to blame
                raise
            except StoreRejected as refusal:
                if len(some) == 1:
                    refused[some[0][self._key]] = str(refusal)
                    continue
                half = len(some) // 2
                refused.update(self._send(how, some[:half], **more))
                refused.update(self._send(how, some[half:], **more))
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

    def publish(self, *, final: bool = False) -> None:
        """Nothing: a written vector answers at once."""
        self._must_write()

    def clear_migration_state(self) -> None:
        """Takes the stamps away. Every row that carries one is written once more for that."""
        self._must_write()
        if not self._dynamic:
            return
        # Milvus Lite keeps an emptied stamp as a field without a value, which `exists` does not find.
        carrying = "" if self._connection.lite else f"exists {STAMP}"
        after: ItemId | None = None
        while ids := self._keys(carrying, after, None, LITE_PAGE):
            for part in self._parts(ids):
                if self._connection.lite:
                    self._take_field_away(part)
                else:
                    page = self.read(part, vectors=True, payload=False)
                    assert page.vectors is not None
                    self.write_vectors(page.ids, page.vectors, None)
            after = ids[-1]

    def _take_field_away(self, ids: list[ItemId]) -> None:
        """Replaces those rows of a Milvus Lite that have the field of the stamp by the same rows without it."""
        rows = [row for row in self._rows(ids, ["*"]).values() if STAMP in row]
        with self._known.held() as known:
            refused = self._write_whole([{name: row[name] for name in row if name != STAMP} for row in rows])
            if known:
                self._known.inserted({row[self._key]: None for row in rows if row[self._key] not in refused})

    # -- a second collection ----------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether there is a collection of that name."""
        return collection_id in self._ask(lambda client: client.list_collections(timeout=self._connection.timeout))

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
            self._ask(lambda client: client.load_collection(collection_id, timeout=LOADING, **replicas))
        except StoreRejected as refusal:
            number = replicas.get("replica_number", 1)
            raise StoreRejected(
                f"there is no room to load a second collection like {self._collection}, with {number} replicas: "
                f"{refusal}: give the server more query nodes, then again"
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
        assert page.vectors is not None
        assert page.payloads is not None
        vectors = as_batch(page.vectors, self._dim, page.ids)
        rejected = unusable(page.ids, vectors)
        kind = "strings" if self._strings else "integers"
        rejected.update({item: f"keys here are {kind}" for item in page.ids if isinstance(item, str) != self._strings})
        place = {item: row for row, item in enumerate(page.ids)}
        for part in self._parts([item for item in page.ids if item not in rejected]):
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
        possible = [item for item in ids if isinstance(item, str) == self._strings]
        for part in self._parts(possible):
            self._delete(part)

    def _delete(self, ids: list[ItemId]) -> None:
        # Not `ids=`: the client puts strings between quotes as they are.
        condition = f"{self._key} in [{', '.join(self._literal(item) for item in ids)}]"
        timeout = self._connection.timeout
        self._may_change()
        self._ask(lambda client: client.delete(self._written_name, filter=condition, timeout=timeout))

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Moves the alias in one request."""
        self._must_write()
        timeout = self._connection.timeout
        if not self.exists(to):
            raise StoreRejected(f"{self._connection.where} has no collection {to!r} to point {alias!r} at")
        if self._collection_of(alias) in (None, alias):
            raise StoreRejected(f"{self._connection.where} has no alias {alias!r}")
        self._ask(lambda client: client.alter_alias(to, alias, timeout=timeout))

    def _collection_of(self, name: str) -> str | None:
        """What a name or an alias leads to."""
        if not self._call("has_collection", name):
            return None
        return str(self._call("describe_collection", name)["collection_name"])

    def drop(self) -> None:
        """Deletes the collection, unless an alias leads to it."""
        self._must_write()
        timeout = self._connection.timeout
        if aliases := self._aliases():
            raise StoreRejected(f"{self._collection} is not deleted: the alias {aliases[0]!r} leads to it")
        self._ask(lambda client: client.drop_collection(self._collection, timeout=timeout))
        self.close()

    def _aliases(self) -> list[str]:
        aliases = self._describe(self._collection).get("aliases")  # Milvus Lite tells none
        if not aliases and self._connection.database == "default":  # 2.3 lists those of no other
            aliases = self._call("list_aliases", self._collection)["aliases"]
        return sorted(aliases or ())

    def _must_write(self) -> None:
        if not self._open:
            raise StoreRejected(f"{self._collection} was closed")
        if not self._write:
            raise StoreRejected(f"{self._collection} was opened for reading only")

    def close(self) -> None:
        """Releases the connection. Safe to repeat."""
        if self._open:
            self._open = False
            self._connection.release()


def _checksum(vector: Any) -> str:
    return hashlib.blake2b(np.ascontiguousarray(vector, "<f4").tobytes(), digest_size=8).hexdigest()


def _plain(value: Any, field: Row | None = None) -> Any:
    """Of the client's types, plain ones, in the form in which it takes them back."""
    if isinstance(value, (str, int, float, bool, bytes)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    plain = [_plain(inner) for inner in value]
    # A vector of bytes comes as a list of one, and goes as what is in it.
    return plain[0] if field and field["type"] in BYTES and len(plain) == 1 and isinstance(plain[0], bytes) else plain


def _index_of(client: MilvusClient, collection: str, field: str, timeout: float) -> Row:
    for name in client.list_indexes(collection, timeout=timeout):
        found: Row | None = client.describe_index(collection, name, timeout=timeout)
        if found and found.get("field_name") == field:
            return found
    raise StoreRejected(f"{collection}.{field} has no index: create one, then again")
