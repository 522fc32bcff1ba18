"""Qdrant: a server over REST or gRPC, or a local folder that one process at a time may open.

Why a crash or the application's own writes do no harm: on a server a write first leaves a write intent in the payload
of its items, a text that begins with the stamp. Vector and stamp are then written on the condition that the intent is
still there. An application that upserts an item removes the intent, so its write wins, and an interrupted write leaves
an intent, which is not the stamp. A local folder has no other writers: there whole points are written.
"""

from __future__ import annotations

import json
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import (
    Capabilities,
    CollectionInfo,
    Fence,
    FurtherVectors,
    Hits,
    ItemId,
    Metric,
    Page,
    Payload,
    Sparse,
    Store,
    StoreBusy,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    order_key,
    same_value,
)
from migrator.adapters.vectors import as_batch, contents, one_line, unusable

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

T = TypeVar("T")

STAMP = "_migrator"
KEYS = ("kind", "url", "api_key", "grpc", "grpc_port", "path", "engine", "collection", "vector", "timeout")
REQUEST_BYTES = 8 << 20  # the server takes 32 MiB; a float in JSON has about 12 bytes
OLDEST = (1, 10)  # the first server version that answers as the client asks (query/batch)
NAMED_SINCE = (1, 13)  # the first that can be asked which points have a certain vector
CONDITIONAL = (1, 16)  # the first with update_filter
ITEMS_WHOLE = 500  # points with further vectors that are read at once, as their size is not known
MAX_MISSING_RETRIES = 5  # times that a server may miss a point which it has
DATATYPES: Mapping[str, float] = {"float32": 1e-6, "float16": 1e-3}  # and how far what is read is from what was written
METRICS: Mapping[str, Metric] = {"Cosine": "cosine", "Dot": "ip", "Euclid": "l2"}


def open_store(config: Mapping[str, Any], *, write: bool) -> Store:
    """Opens `config["collection"]`, a name or an alias, at `url` or in the folder `path`.

    Raises `StoreRejected` for what is not there or cannot be migrated, `StoreUnavailable` if the server does not
    answer, `StoreBusy` if another process has the folder.
    """
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        raise StoreRejected(f"a qdrant store has no setting {unknown[0]!r}: known are {', '.join(KEYS[1:])}")
    if ("url" in config) == ("path" in config):
        raise StoreRejected("a qdrant store needs either `url`, of a server, or `path`, a local folder")
    if not isinstance(config.get("collection"), str):
        raise StoreRejected("a qdrant store needs `collection`, a collection's name or alias")
    if "engine" in config and config["engine"] != "local":
        from migrator.adapters import qdrant_edge

        return qdrant_edge.open_store(config, write=write)
    connection = _connect(config)
    try:
        return QdrantStore(connection, config["collection"], vector=config.get("vector"), write=write)
    except BaseException:
        connection.release()
        raise


def _connect(config: Mapping[str, Any]) -> Connection:
    from qdrant_client import QdrantClient

    if "url" in config:
        return _reach(config)
    folder = Path(config["path"]).absolute()
    if not (folder / "meta.json").is_file():
        raise StoreRejected(f"{folder} holds no local Qdrant: correct `path` of the store")
    _check_free(folder)
    # Searching is brute force there, which its users know.
    warnings.filterwarnings("ignore", message="Local mode is not recommended", category=UserWarning)
    client = _translated(str(folder), lambda: QdrantClient(path=str(folder), force_disable_check_same_thread=True))
    return Connection(client, str(folder), local=True)


def _reach(config: Mapping[str, Any]) -> Connection:
    """A connection to the server at `url`, which must be a Qdrant."""
    from qdrant_client import QdrantClient

    url, key = str(config["url"]), config.get("api_key")
    where = url.split("@")[-1].rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise StoreRejected(f"`url` of a qdrant store is http://HOST:PORT or https://HOST:PORT, not {where!r}")
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable() and key.strip() == key):
        # The client would put it into an error message, and call it a broken connection.
        raise StoreRejected("`api_key` of a qdrant store has characters that no key has, perhaps the end of a line")
    # `plan` says so, once, and not as a warning among other lines.
    warnings.filterwarnings("ignore", message="Api key is used with an insecure connection", category=UserWarning)
    timeout = int(config.get("timeout", 30))
    client = _translated(
        where,
        lambda: QdrantClient(
            url=url,
            api_key=key,
            prefer_grpc=bool(config.get("grpc", False)),
            grpc_port=int(config.get("grpc_port", 6334)),
            timeout=timeout,
            check_compatibility=False,
        ),
    )
    exposed, rest = key is not None and url.startswith("http://"), not config.get("grpc", False)
    connection = Connection(client, where, local=False, exposed=exposed, rest=rest, timeout=timeout)
    try:
        connection.version()
    except BaseException as error:
        connection.release()
        if isinstance(error, _Foreign | StoreRejected) and not isinstance(error, _Denied):
            raise StoreRejected(f"{where} does not answer like a Qdrant: correct `url` of the store") from error
        raise
    return connection


def _check_free(folder: Path) -> None:
    """Refuses a folder that another process has open, before the client reads it and leaves files open."""
    import portalocker

    lock = folder / ".lock"
    if lock.exists():
        with lock.open("r+") as file:
            try:
                portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
            except portalocker.LockException as error:
                raise StoreBusy(f"{folder} is open in another process") from error
            portalocker.unlock(file)


class Connection:
    """A client that several stores share. The last one closes it."""

    def __init__(
        self,
        client: QdrantClient,
        where: str,
        *,
        local: bool,
        keep: bool = False,
        exposed: bool = False,
        rest: bool = False,
        timeout: float = 30.0,
    ) -> None:
        self.client, self.where, self.local, self.rest = client, where, local, rest
        self.timeout = timeout  # seconds that one request may take
        self.exposed = exposed  # the api key travels unencrypted
        self._version: str | None = None
        self._guard = threading.RLock() if local else nullcontext()  # the local client is not made for threads
        self._users = 2 if keep else 1  # `keep`: somebody else closes it

    def shared(self) -> Connection:
        """This connection, for one more store."""
        self._users += 1
        return self

    def release(self) -> None:
        """One store less."""
        self._users -= 1
        if self._users == 0:
            self.client.close()

    def ask(self, call: Callable[[QdrantClient], T]) -> T:
        """Makes a call, with the client's exceptions in this package's words."""
        with self._guard:
            return _translated(self.where, lambda: call(self.client))

    def version(self) -> str:
        """Version of the server, asked for once; of the client, for a folder."""
        if self._version is None:
            info = self.ask(lambda client: client.info())
            if "qdrant" not in info.title:
                raise _Foreign(f"{self.where} calls itself {one_line(info.title)}")
            self._version = str(info.version)
        return self._version

    def description(self, collection: str) -> dict[str, Any]:
        """Settings and payload indexes of a collection; over REST also those that the client has no name for."""
        if self.rest:
            answer = self.ask(
                lambda client: client.http.client.request(
                    type_=dict[str, Any],
                    method="GET",
                    url="/collections/{collection_name}",
                    path_params={"collection_name": collection},
                )
            )
            found = answer["result"]
        else:
            found = self.ask(lambda client: client.get_collection(collection)).model_dump(mode="json")
        config = {**_set(found["config"]), "metadata": found["config"].get("metadata")}  # where null is a value
        return {"config": config, "payload_schema": _set(found.get("payload_schema") or {})}

    def server_version(self) -> tuple[int, ...]:
        """Its first two numbers."""
        return tuple(int(part) for part in self.version().split("-")[0].split(".")[:2] if part.isdigit())


class _Missing(Exception):
    """A point that a request names does not exist; the others were written."""


class _Foreign(StoreUnavailable):
    """What answered does not speak like a Qdrant: another server, or a proxy that stands before it."""


class _Denied(StoreRejected):
    """Wrong credentials."""


class _BadRequest(StoreRejected):
    """Something in this request is wrong, perhaps a single point."""


def _translated(where: str, call: Callable[[], T]) -> T:
    import grpc
    from pydantic import ValidationError
    from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    try:
        return call()
    except ResourceExhaustedResponse as error:
        raise StoreUnavailable(f"{where} is overloaded", retry_after=error.retry_after_s) from error
    except UnexpectedResponse as error:
        raise _of_status(where, error.status_code or 500, error.content, error.headers.get("Retry-After")) from error
    except ResponseHandlingException as error:
        if isinstance(error.source, ValidationError):
            if unknown := _unknown_setting(error.source):
                raise StoreRejected(
                    f"{where} has the setting {unknown}, which this qdrant-client does not know: upgrade qdrant-client"
                ) from error
            raise _Foreign(f"{where} answered with something that is not Qdrant's: is it a Qdrant?") from error
        raise StoreUnavailable(f"{where} did not answer: {one_line(error.source)}") from error
    except QdrantException as error:
        raise StoreUnavailable(f"{where} did not answer: {one_line(error)}") from error
    except grpc.RpcError as error:
        raise _of_rpc(where, error) from error
    except KeyError as error:  # the local client's word for a point that is not there
        raise _Missing(str(error)) from error
    except RuntimeError as error:
        if "already accessed" in str(error):
            raise StoreBusy(f"{where} is open in another process") from error
        raise StoreUnavailable(f"{where} did not answer: {one_line(error)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _Foreign(f"{where} answered with something that is not JSON: is it a Qdrant?") from error
    except AssertionError as error:  # the client's word for an answer without a result
        raise _Foreign(f"{where} answered with nothing: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise _BadRequest(f"{where} refused: {one_line(error)}") from error
    except OSError as error:
        raise StoreUnavailable(f"{where} did not answer: {one_line(error)}") from error


def _unknown_setting(error: Any) -> str | None:
    """The setting in a collection's description that the client has no name for, if that is what is wrong."""
    places = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
    deepest = max(places, key=len, default=())  # where a value may be of several types, the others complain earlier
    for part in ("config", "payload_schema"):
        if part in deepest:
            return ".".join(str(name) for name in deepest[deepest.index(part) + 1 :])
    return None


def _of_status(where: str, status: int, content: bytes, retry_after: str | None) -> Exception:
    said = _said(content)
    if status in (401, 403):
        return _Denied(f"{where} refuses these credentials ({said}): correct `api_key` of the store")
    if status == 404 and "No point" in said:
        return _Missing(said)
    if status in (408, 429) or status >= 500:
        advised = float(retry_after) if retry_after and retry_after.isdigit() else None
        return StoreUnavailable(f"{where} answered with status {status}: {said}", retry_after=advised)
    kind = _BadRequest if status in (400, 413, 422) else StoreRejected
    return kind(f"{where} refused with status {status}: {said}")


def _said(content: bytes) -> str:
    """The error in a server's answer."""
    try:
        return one_line(json.loads(content)["status"]["error"])
    except (ValueError, LookupError, TypeError):
        return one_line(content.decode(errors="replace"))


def _of_rpc(where: str, error: Any) -> Exception:
    import grpc

    code, said = error.code(), one_line(error.details() or "")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return _Denied(f"{where} refuses these credentials ({said}): correct `api_key` of the store")
    if code == grpc.StatusCode.NOT_FOUND and "No point" in said:
        return _Missing(said)
    passing = (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN,
    )  # fmt: skip
    if code in passing:
        return StoreUnavailable(f"{where} did not answer ({code.name}): {said}")
    kind = _BadRequest if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE) else StoreRejected
    return kind(f"{where} refused ({code.name}): {said}")


class QdrantStore:
    """One collection of a Qdrant. It shares `connection`, and releases it when it is closed."""

    def __init__(self, connection: Connection, collection: str, *, vector: str | None, write: bool) -> None:
        self._connection, self._write = connection, write
        self._open = True
        self._collection, self._alias = self._resolve(collection)
        self._written_name = self._collection
        self._name, self._params = self._vector(vector)
        self._named = bool(self._name)
        self._further = tuple(sorted(self._further_names()))
        self._which: Any = [self._name] if self._named or self._further else True
        self._indexed = False
        self._fence: Fence | None = None

    # -- facts ----------------------------------------------------------------------------------------------------

    def _ask(self, call: Callable[[QdrantClient], T]) -> T:
        if not self._open:
            raise StoreRejected(f"{self._collection} was closed")
        return self._connection.ask(call)

    def _resolve(self, collection: str) -> tuple[str, str | None]:
        """The collection's own name, and the alias if it was that."""
        there = self._collections()
        if collection in there:
            return collection, None
        for found in self._connection.ask(lambda client: client.get_aliases()).aliases:
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
        return {found.name for found in self._connection.ask(lambda client: client.get_collections()).collections}

    def _config(self) -> Any:
        return self._connection.ask(lambda client: client.get_collection(self._collection))

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
        if _datatype(params) not in DATATYPES:
            known = " or ".join(DATATYPES)
            raise StoreRejected(
                f"{where} keeps its vectors as {_datatype(params)}, which can be migrated as {known} only"
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
            exact_vectors=_datatype(self._params) == "float32",
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
        records, _ = self._ask(
            lambda client: client.scroll(self._collection, limit=some, with_payload=True, with_vectors=False)
        )
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
            records, offset = self._ask(
                lambda client, offset=offset, size=size: client.scroll(  # type: ignore[misc]
                    self._collection,
                    scroll_filter=condition,
                    limit=size,
                    offset=offset,
                    with_payload=fields,
                    with_vectors=which,
                    consistency=_majority(),
                )
            )
            for record in records:
                key = order_key(plain_id(record.id))
                if reached is not None and key <= reached:
                    raise StoreRejected(f"{self._where()} gives its points out of order: {record.id} comes again")
                reached = key
                if last is not None and key > last:
                    return found[:limit]
                # Before 1.13 a filter cannot ask for the vector, and a point may lack it.
                if (beyond is None or key > beyond) and (not which or self._vector_of(record) is not None):
                    found.append(record)
            if offset is None:
                break
            if not records:
                raise StoreRejected(f"{self._where()} gives an empty page and says that there are more")
        return found[: max(limit, 0)]

    def scan(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> Page:
        """The next `limit` points with vectors and payloads, in one scroll."""
        size = self._allowed(self._per_request(), "max_query_limit")
        records = self._records(self._filter(), after, up_to, limit, size, fields=True, which=self._which)
        return self._page(records, vectors=True, payload=True)

    def read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Page:
        """The points as they were written last."""
        fields: Any = True if payload else [STAMP]
        which: Any = self._which if vectors or self._which is not True else False
        found = {
            item: record
            for item, record in self._retrieve(ids, fields, which, self._per_request()).items()
            if not which or self._vector_of(record) is not None
        }
        self._check_none_missing(ids, found)
        return self._page([found[item] for item in ids if item in found], vectors=vectors, payload=payload)

    def _retrieve(self, ids: Sequence[ItemId], fields: Any, which: Any, size: int) -> dict[ItemId, Any]:
        found: dict[ItemId, Any] = {}
        for part in _parts([item for item in ids if can_be_id(item)], size):
            records = self._ask(
                lambda client, part=part: client.retrieve(  # type: ignore[misc]
                    self._collection, ids=part, with_payload=fields, with_vectors=which, consistency=_majority()
                )
            )
            found.update({plain_id(record.id): record for record in records})
        return found

    def _check_none_missing(self, ids: Sequence[ItemId], found: Mapping[ItemId, Any]) -> None:
        missing = [item for item in ids if can_be_id(item) and item not in found]
        if missing and not self._connection.local and (left := self._count(self._filter(ids=missing))):
            raise StoreUnavailable(f"{self._where()} gave {left} points less than were asked for and are there")

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

    def _page(self, records: Sequence[Any], *, vectors: bool, payload: bool) -> Page:
        payloads = [dict(record.payload or {}) for record in records]
        stamps = [as_stamp(fields.pop(STAMP, None)) for fields in payloads]
        stacked: Vectors | None = None
        if vectors:
            stacked = self._stacked(records)
        return Page([plain_id(record.id) for record in records], stacked, payloads if payload else None, stamps)

    def _stacked(self, records: Sequence[Any]) -> Vectors:
        dim = self._params.size
        try:
            vectors = np.array([self._vector_of(record) for record in records], np.float32).reshape(len(records), dim)
        except (ValueError, TypeError) as error:
            for record in records:
                if np.shape(self._vector_of(record)) != (dim,):
                    raise StoreRejected(
                        f"{self._where()} gave point {record.id} a vector that is not {dim} numbers"
                    ) from error
            raise
        # Over REST it could not be put back, and no search finds it.
        finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
        if not finite.all():
            item = records[int(np.flatnonzero(~finite)[0])].id
            raise StoreRejected(f"{self._where()} holds a vector that is not finite, of point {item}: mend it first")
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
        return int(self._ask(lambda client: client.count(self._collection, count_filter=condition, exact=True)).count)

    def sample(self, n: int, *, seed: int) -> list[ItemId]:
        """`n` distinct ids in random order."""
        everything: list[ItemId] = []
        while more := self.scan_ids(after=everything[-1] if everything else None, limit=100_000):
            everything += more
        chosen = np.random.default_rng(seed).choice(len(everything), min(max(n, 0), len(everything)), replace=False)
        return [everything[row] for row in chosen.tolist()]

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest points to each of `vectors` (n, dim). `exact` compares with all of them."""
        from qdrant_client import models

        queries = as_batch(vectors, self._params.size)
        if k < 1 or not np.isfinite(queries).all():
            raise StoreRejected(f"a search needs finite vectors and at least one answer, k is {k}")
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
            answers = self._ask(
                lambda client, block=block: client.query_batch_points(self._collection, requests=block)  # type: ignore[misc]
            )
            for answer in answers:
                ids.append([plain_id(point.id) for point in answer.points])
                values = [float(point.score) for point in answer.points]
                if METRICS[self._params.distance.value] == "l2":
                    values = [-(value**2) for value in values]
                scores.append(values)
        return Hits(ids, scores)

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
        for part in _parts(list(ids), self._per_request()):
            if self._connection.local and not self._further_names():
                outcome = self._write_whole(part, rows, batch, stamp, before, rejected)
            else:
                outcome = self._write_claimed(part, rows, batch, stamp, before, rejected)
            written += outcome.written
            deleted += outcome.deleted
            changed += outcome.changed
            rejected.update(outcome.rejected)
        lost = set(deleted)
        return WriteReport(written, deleted, {item: why for item, why in rejected.items() if item not in lost}, changed)

    def _change(self, call: Callable[[QdrantClient], Any]) -> None:
        """Makes a change, or several in one request, and sees that they were made and not only noted for later."""
        if self._fence is not None:
            self._fence(self._connection.timeout)
        result = self._ask(call)
        for each in result if isinstance(result, list) else [result]:
            status = getattr(getattr(each, "status", None), "value", None)
            if status != "completed":
                raise StoreUnavailable(f"{self._where()} took a change and has not made it yet ({status})")

    def _further_names(self) -> dict[str, str | None]:
        """Names of the vectors besides the one that is migrated, with the distance of those that are not sparse."""
        from qdrant_client import models

        params = self._config().config.params
        dense = {"": params.vectors} if isinstance(params.vectors, models.VectorParams) else params.vectors or {}
        found: dict[str, str | None] = {name: each.distance.value for name, each in dense.items() if name != self._name}
        return {**found, **dict.fromkeys(params.sparse_vectors or {})}

    def _sort(
        self,
        part: Sequence[ItemId],
        rows: Mapping[ItemId, int],
        vectors: Vectors,
        before: Mapping[ItemId, Any] | None,
        rejected: Mapping[ItemId, str],
    ) -> tuple[dict[ItemId, Payload], list[ItemId], dict[ItemId, bool]]:
        """Payloads of the points to write, those that are gone, and those that changed.

        Of the last it says whether the new vector is there all the same: a call was cut off and is repeated, and the
        application changed the payload in between.
        """
        page = self.read(part, vectors=before is not None, payload=True)
        assert page.payloads is not None
        now = dict(zip(page.ids, page.payloads, strict=True))
        deleted = [item for item in part if item not in now]
        changed: dict[ItemId, bool] = {}
        if before is not None:
            for item, (vector, payload) in contents(page).items():
                if item in rejected or same_value((vector, payload), before.get(item)):
                    continue
                ours = self._same(vector, vectors[rows[item]])
                # Where only the vector is another one, and it is ours, the call was cut off and is repeated.
                if not ours or item not in before or not same_value(payload, before[item][1]):
                    changed[item] = ours
        leave = {*changed, *rejected}
        to_write = {item: payload for item, payload in now.items() if item not in leave}
        return to_write, deleted, changed

    def _same(self, stored: bytes, vector: Vectors) -> bool:
        """Whether `stored` is what becomes of `vector` when it is written."""
        there, target = np.frombuffer(stored, np.float32).astype(np.float64), vector.astype(np.float64)
        if METRICS[self._params.distance.value] == "cosine" and target.any() and there.any():
            there, target = there / np.linalg.norm(there), target / np.linalg.norm(target)
        apart = DATATYPES[_datatype(self._params)]
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
        refused = self._upsert(points) if points else {}
        return WriteReport([item for item in to_write if item not in refused], deleted, refused, list(changed))

    def _write_claimed(
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
            self._clear([item for item, ours in others.items() if not ours])
        condition = self._filter(stamp=intent) if stamp is not None and self._conditional() else None

        def put(items: list[ItemId]) -> None:
            """Vectors and then stamps in one request: cut off anywhere, it leaves no stamp beside an old vector."""
            these = [models.PointVectors(id=item, vector=self._as_vector(vectors[rows[item]])) for item in items]
            operations: list[Any] = [
                models.UpdateVectorsOperation(
                    update_vectors=models.UpdateVectors(points=these, update_filter=condition)
                ),
                models.DeletePayloadOperation(delete_payload=models.DeletePayload(keys=[STAMP], points=_ids(items)))
                if stamp is None
                else models.SetPayloadOperation(
                    set_payload=models.SetPayload(payload={STAMP: stamp}, filter=self._filter(stamp=intent, ids=items))
                ),
            ]
            self._change(lambda client: client.batch_update_points(self._written_name, operations, wait=True))

        refused = self._put_all(list(to_write), put)
        self._clear(list(refused))
        points = [item for item in to_write if item not in refused]
        if not points:
            return WriteReport((), deleted, refused, changed)
        if stamp is None:
            there = set(self.read(points, vectors=False, payload=False).ids)
            lost = [item for item in points if item not in there]
            return WriteReport([item for item in points if item in there], [*deleted, *lost], refused, changed)
        page = self.read(points, vectors=False, payload=not self._conditional())
        stamps = dict(zip(page.ids, page.stamps, strict=True))
        late = [item for item in page.ids if stamps[item] != stamp]
        if page.payloads is not None:  # without conditions all that can be seen afterwards is another payload
            later = dict(zip(page.ids, page.payloads, strict=True))
            overwritten = [
                item for item in page.ids if not same_value(later[item], to_write[item]) and item not in late
            ]
            self._write_intent(overwritten, intent)
            late += overwritten
        lost = [item for item in points if item not in stamps]
        done = [item for item in points if item in stamps and item not in set(late)]
        return WriteReport(done, [*deleted, *lost], refused, [*changed, *late])

    def _put_all(self, items: list[ItemId], put: Callable[[list[ItemId]], None]) -> dict[ItemId, str]:
        """Writes items; halves a batch that is refused, down to the item that is to blame, and says which were."""
        if not items:
            return {}
        try:
            self._despite_missing(items, put)
        except _BadRequest as refusal:
            if len(items) == 1:
                return {items[0]: str(refusal)}
            half = len(items) // 2
            return {**self._put_all(items[:half], put), **self._put_all(items[half:], put)}
        return {}

    def _despite_missing(self, items: Sequence[ItemId], change: Callable[[list[ItemId]], Any]) -> None:
        """Makes a change to those points that exist; a point that goes meanwhile must not stop the others."""
        remaining = list(items)
        missing_retries = 0
        while remaining:
            try:
                change(remaining)
                return
            except _Missing as missing:
                there = set(self.read(remaining, vectors=False, payload=False).ids)
                missing_retries += len(there) == len(remaining)
                if missing_retries > MAX_MISSING_RETRIES:  # a point may come back, but not over and over
                    raise StoreUnavailable(f"{self._where()} misses points that it has: {missing}") from missing
                remaining = [item for item in remaining if item in there]

    def _write_intent(self, items: Sequence[ItemId], intent: str) -> None:
        self._despite_missing(
            items,
            lambda these: self._change(
                lambda client: client.set_payload(self._written_name, {STAMP: intent}, points=_ids(these), wait=True)
            ),
        )

    def _clear(self, items: Sequence[ItemId]) -> None:
        """Takes the stamps of these points away."""
        self._despite_missing(
            items,
            lambda these: self._change(
                lambda client: client.delete_payload(self._written_name, [STAMP], points=_ids(these), wait=True)
            ),
        )

    def _index_stamps(self) -> None:
        """Lets the server find stamps without looking at every payload."""
        from qdrant_client import models

        if self._indexed or self._connection.local:
            return
        self._change(
            lambda client: client.create_payload_index(
                self._collection, STAMP, field_schema=models.PayloadSchemaType.KEYWORD, wait=True
            )
        )
        self._indexed = True

    def _as_vector(self, vector: Vectors, further: FurtherVectors | None = None) -> Any:
        if further:
            return {self._name: vector.tolist(), **{name: _as_given(each) for name, each in further.items()}}
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
        self._ask(lambda client: client.update_collection_aliases([models.CreateAliasOperation(create_alias=create)]))

    def delete_write_alias(self, alias: str) -> None:
        """On a server; a local folder is locked."""
        from qdrant_client import models

        if self._connection.local or alias not in self._aliases():
            return
        delete = models.DeleteAlias(alias_name=alias)
        self._ask(lambda client: client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=delete)]))

    def write_through(self, alias: str) -> None:
        """Where the alias exists: a server may forbid it."""
        if not self._connection.local and alias in self._aliases():
            self._written_name = alias

    def _aliases(self) -> list[str]:
        """Aliases of this collection."""
        found = self._ask(lambda client: client.get_collection_aliases(self._collection)).aliases
        return [each.alias_name for each in found]

    def publish(self, *, final: bool = False) -> None:
        """Nothing: a written vector answers at once."""
        self._must_write()
        self._ask(lambda client: client.get_collection(self._collection))

    def clear_migration_state(self) -> None:
        """Removes the stamps."""
        self._must_write()
        from qdrant_client import models

        self._finds_stamps()  # strict mode needs their index, also where no write has made it
        carrying = models.Filter(must_not=[models.IsEmptyCondition(is_empty=models.PayloadField(key=STAMP))])
        self._change(lambda client: client.delete_payload(self._collection, [STAMP], points=carrying, wait=True))
        if not self._connection.local:
            self._change(lambda client: client.delete_payload_index(self._collection, STAMP, wait=True))
            self._indexed = False

    # -- a second collection ----------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether there is a collection of that name."""
        self._ask(lambda client: None)
        return collection_id in self._collections()

    def open_collection(self, collection_id: str) -> QdrantStore:
        """Another collection over the same connection."""
        self._ask(lambda client: None)
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
                self._ask(lambda client: client.delete_collection(collection_id))
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
            _creation(self._connection.description(self._collection)["config"], without=_late_settings(models))
        )
        words = {name: getattr(body, name) for name in body.model_fields_set}
        vectors = words.pop("vectors")
        if self._name or not isinstance(vectors, models.VectorParams):
            words["vectors_config"] = {**vectors, self._name: vectors[self._name].model_copy(update={"size": dim})}
        else:
            words["vectors_config"] = vectors.model_copy(update={"size": dim})
        if "sparse_vectors" in words:
            words["sparse_vectors_config"] = words.pop("sparse_vectors")
        self._ask(lambda client: client.create_collection(collection_id, **words))

    def _complete(self, collection_id: str) -> None:
        """What cannot be said when a collection is created. May be repeated: what is there already stays as it is."""
        from qdrant_client import models

        if self._connection.local:
            return
        params = self._connection.description(self._collection)["config"]["params"]
        late = {name: params[name] for name in _late_settings(models) if name in params}
        if late:
            diff = models.CollectionParamsDiff.model_validate(late)
            self._ask(lambda client: client.update_collection(collection_id, collection_params=diff))
        for field, index in (self._config().payload_schema or {}).items():
            if field != STAMP:
                self._change(
                    lambda client, field=field, index=index: client.create_payload_index(  # type: ignore[misc]
                        collection_id, field, field_schema=index.params or index.data_type, wait=True
                    )
                )

    def _difference(self, collection_id: str) -> str | None:
        """The first setting in which another collection differs from this one, apart from the vectors' length."""
        one = _comparable(self._connection.description(self._collection), self._name)
        other = _comparable(self._connection.description(collection_id), self._name)
        paths = [path for path in {**one, **other} if not same_value(one.get(path, _UNSET), other.get(path, _UNSET))]
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
            models.CreateCollection.model_validate(_creation(config, without=_late_settings(models)))
        except ValidationError as error:
            unknown = next((each for each in error.errors() if each["type"] == "extra_forbidden"), error.errors()[0])
            name = ".".join(str(part) for part in unknown["loc"])
            raise StoreRejected(
                f"{where} has the setting {name}, which this qdrant-client does not know: upgrade qdrant-client, or "
                "use rollout.strategy in_place"
            ) from error
        if self._connection.server_version() >= NAMED_SINCE:
            without = int(self._ask(lambda client: client.count(self._collection, exact=True)).count) - self.count()
            if without > 0:
                raise StoreRejected(
                    f"{where} has {without} points without the vector {self._name!r}, which a copy would lose: use "
                    "rollout.strategy in_place, or move these points to a collection of their own"
                )

    def insert(self, page: Page) -> WriteReport:
        """Upserts whole points, with further vectors where the collection has such."""
        from qdrant_client import models

        self._must_write()
        assert page.vectors is not None
        assert page.payloads is not None
        if page.further is None and self._further:
            raise StoreRejected(f"points of {self._where()} have further vectors, which are not given")
        vectors = as_batch(page.vectors, self._params.size, page.ids)
        rejected = unusable(page.ids, vectors)
        rejected.update(
            {item: "Qdrant's ids are unsigned integers and UUIDs" for item in page.ids if not can_be_id(item)}
        )
        if not self._connection.local:
            rejected.update(_not_json(page))
        further = page.further if page.further is not None else [{}] * len(page)
        rows = zip(page.ids, vectors, page.payloads, page.stamps, further, strict=True)
        points = [
            models.PointStruct(id=item, vector=self._as_vector(vector, more), payload=with_stamp(payload, stamp))
            for item, vector, payload, stamp, more in rows
            if item not in rejected
        ]
        sizes = [
            12 * sum(map(_numbers, more.values()))
            for item, more in zip(page.ids, further, strict=True)
            if item not in rejected
        ]
        for part in _batches(points, sizes, self._per_request()):
            rejected.update(self._upsert(part))
        return WriteReport([item for item in page.ids if item not in rejected], (), rejected)

    def _upsert(self, points: list[Any]) -> dict[ItemId, str]:
        """Writes points; halves a batch that is refused, down to the point that is to blame."""
        try:
            self._change(lambda client: client.upsert(self._written_name, points, wait=True))
        except _BadRequest as refusal:
            if len(points) == 1:
                return {plain_id(points[0].id): str(refusal)}
            half = len(points) // 2
            return {**self._upsert(points[:half]), **self._upsert(points[half:])}
        return {}

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Removes these points."""
        self._must_write()
        possible = [item for item in ids if can_be_id(item)]
        if possible:
            self._change(lambda client: client.delete(self._written_name, points_selector=_ids(possible), wait=True))

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Moves the alias in one request."""
        from qdrant_client import models

        self._must_write()
        leads_to = {found.alias_name: found.collection_name for found in self._ask(lambda c: c.get_aliases()).aliases}
        if alias not in leads_to:
            raise StoreRejected(f"{self._connection.where} has no alias {alias!r}")
        if not self.exists(to):
            raise StoreRejected(f"{self._connection.where} has no collection {to!r} to point {alias!r} at")
        if leads_to[alias] == to:
            return
        self._ask(
            lambda client: client.update_collection_aliases(
                [
                    models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
                    models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=to, alias_name=alias)),
                ]
            )
        )

    def drop(self) -> None:
        """Deletes the collection, unless an alias leads to it."""
        self._must_write()
        if aliases := self._aliases():
            raise StoreRejected(f"{self._collection} is not deleted: the alias {aliases[0]!r} leads to it")
        self._ask(lambda client: client.delete_collection(self._collection))
        self.close()

    def _must_write(self) -> None:
        if self._open and not self._write:
            raise StoreRejected(f"{self._collection} was opened for reading only")
        if not self._open:
            raise StoreRejected(f"{self._collection} was closed")

    def close(self) -> None:
        """Releases the connection. Safe to repeat."""
        if self._open:
            self._open = False
            self._connection.release()


def _ids(items: Sequence[ItemId]) -> Any:
    """For the client's types, whose lists also hold UUID objects."""
    return list(items)


def _majority() -> Any:
    from qdrant_client import models

    return models.ReadConsistencyType.MAJORITY


def can_be_id(item: ItemId) -> bool:
    """Whether Qdrant could have given this id: an unsigned integer, or a UUID in its usual form."""
    if isinstance(item, int):
        return 0 <= item < 2**64
    try:
        return str(uuid.UUID(item)) == item
    except ValueError:
        return False


def _datatype(params: Any) -> str:
    return getattr(params.datatype, "value", params.datatype) or "float32"


def plain_id(item: Any) -> ItemId:
    """An id of the client's as an id of ours."""
    return item if isinstance(item, int) else str(item)


def as_stamp(value: Any) -> str | None:
    """What the payload says under the stamp's key, whatever an application put there."""
    return None if value is None else str(value)


def with_stamp(payload: Payload, stamp: str | None) -> dict[str, Any]:
    """The payload as it is stored."""
    return dict(payload) if stamp is None else {**payload, STAMP: stamp}


def _parts(ids: Sequence[ItemId], size: int) -> Iterator[list[ItemId]]:
    for start in range(0, len(ids), size):
        yield list(ids[start : start + size])


def _batches(points: Sequence[Any], extra: Sequence[int], most: int) -> Iterator[list[Any]]:
    """Points for one request each: at most `most`, and of no more `extra` bytes than a request should have."""
    batch: list[Any] = []
    size = 0
    for point, more in zip(points, extra, strict=True):
        if batch and (len(batch) == most or size + more > REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += more
    if batch:
        yield batch


def _not_json(page: Page) -> dict[ItemId, str]:
    """Items whose payload holds NaN or infinity: the client would send null, or a text, in their place."""
    found: dict[ItemId, str] = {}
    for item, payload in zip(page.ids, page.payloads or (), strict=True):
        try:
            json.dumps(payload, allow_nan=False, default=str)
        except ValueError:
            found[item] = "the payload holds NaN or infinity, which a Qdrant server cannot keep"
    return found


# -- further vectors, as this package has them and as the client has them ---------------------------------------------


def plain_vector(vector: Any) -> NDArray[np.float64] | Sparse:
    """A vector of the client's as one of ours."""
    if hasattr(vector, "indices"):
        order = np.argsort(vector.indices, kind="stable")
        return Sparse(np.array(vector.indices, np.uint32)[order], np.array(vector.values, np.float64)[order])
    return np.array(vector, np.float64)


def _as_given(vector: NDArray[np.float64] | Sparse) -> Any:
    from qdrant_client import models

    if isinstance(vector, Sparse):
        return models.SparseVector(indices=vector.indices.tolist(), values=vector.values.tolist())
    return vector.tolist()


def _numbers(vector: NDArray[np.float64] | Sparse) -> int:
    """How many numbers a request needs for it."""
    return 2 * len(vector.values) if isinstance(vector, Sparse) else int(vector.size)


# -- a collection's description ---------------------------------------------------------------------------------------

_UNSET = object()


def _set(description: Any) -> Any:
    """A description without the settings that are not set."""
    if isinstance(description, Mapping):
        return {name: _set(value) for name, value in description.items() if value is not None}
    return description


def _creation(config: Mapping[str, Any], *, without: set[str]) -> dict[str, Any]:
    """The settings of a description under the names that `CreateCollection` has for them."""
    settings = {**config["params"], **{name: value for name, value in config.items() if name != "params"}}
    settings["optimizers_config"] = settings.pop("optimizer_config")
    return {name: value for name, value in settings.items() if name not in without}


def _late_settings(models: Any) -> set[str]:
    """Those that only an update of a collection can say."""
    return set(models.CollectionParamsDiff.model_fields) - set(models.CreateCollection.model_fields)


def _comparable(description: Mapping[str, Any], vector: str) -> dict[str, Any]:
    """Each setting under its path, but for the length of `vector` and for what counts points."""
    config = {**description["config"]}
    if not config.get("metadata"):
        config.pop("metadata", None)
    found = dict(flat(config, ""))
    for length in {f"params.vectors.{vector}.size", *([] if vector else ["params.vectors.size"])}:
        found.pop(length, None)
    for field, index in description["payload_schema"].items():
        if field != STAMP:
            params = {name: value for name, value in index.get("params", {}).items() if name != "type"}
            found |= flat({"data_type": index["data_type"], **params}, f"payload index {field}")
    return found


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings, each with its path."""
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from flat(each, f"{path}.{name}" if path else name)
    else:
        yield path, value
