"""A Qdrant server for tests: the part of its REST API that the adapter and its applications use, over local mode.

Bodies are read with the client's own models, which are made from the published OpenAPI description, and answers have
the server's shapes. Faults come when a test asks for them: `front.fail("status", status=503, times=3)`.

Run as a program (`python -m tests.qdrant_front :memory: 0`) it serves until its standard input closes or it is
killed, and prints its port first, so that several processes can share one Qdrant.
"""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pydantic_core
from pydantic import TypeAdapter, ValidationError
from qdrant_client import QdrantClient
from qdrant_client.http import models as m

What = Literal["status", "drop", "drop_after", "slow", "garbage", "half", "torn", "acknowledged", "spoiled"]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches `path`."""

    what: What
    times: int = 1
    path: str = ""
    skip: int = 0
    """So many of these requests pass before the first one fails."""
    status: int = 500
    retry_after: str | None = None
    spoil: Callable[[Any], Any] | None = None
    """What becomes of a result, for `spoiled`."""


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(
        self, status: int, error: str, headers: Sequence[tuple[str, str]] = (), *, plain: bool = False
    ) -> None:
        super().__init__(error)
        self.status, self.headers, self.plain = status, headers, plain


class Qdrant:
    """What the server does, in the client's models, one request at a time."""

    def __init__(self, location: str, version: str) -> None:
        self.client = (
            QdrantClient(":memory:")
            if location == ":memory:"
            else QdrantClient(path=location, force_disable_check_same_thread=True)
        )
        self.version = version
        self._created: dict[str, m.CreateCollection] = {}
        self._updated: dict[str, dict[str, Any]] = {}
        self._indexes: dict[str, dict[str, Any]] = {}

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    # -- collections ----------------------------------------------------------------------------------------------

    def info(self) -> m.VersionInfo:
        return m.VersionInfo(title="qdrant - vector search engine", version=self.version, commit="0" * 40)

    def collections(self) -> m.CollectionsResponse:
        return self.client.get_collections()

    def exists(self, collection: str) -> m.CollectionExistence:
        return m.CollectionExistence(exists=self.client.collection_exists(collection))

    def collection(self, collection: str) -> m.CollectionInfo:
        """Local mode forgets the settings that only a server has; here they are kept, or have the server's defaults."""
        info = self.client.get_collection(collection)
        for setting, field in m.CollectionParams.model_fields.items():
            if getattr(info.config.params, setting) is None:
                setattr(info.config.params, setting, field.default)
        name = self._behind(collection)
        indexes = {
            field: m.PayloadIndexInfo(
                data_type=schema if isinstance(schema, m.PayloadSchemaType) else schema.type.value,
                params=None if isinstance(schema, m.PayloadSchemaType) else schema,
                points=info.points_count or 0,
            )
            for field, schema in self._indexes.get(name, {}).items()
        }
        config, created = info.config, self._created.get(name)
        if created is not None:
            config.hnsw_config = _over(config.hnsw_config, created.hnsw_config)
            config.optimizer_config = _over(config.optimizer_config, created.optimizers_config)
            config.wal_config = _over(config.wal_config, created.wal_config)
            config.quantization_config = created.quantization_config
            if created.strict_mode_config is not None:
                config.strict_mode_config = m.StrictModeConfigOutput(
                    **created.strict_mode_config.model_dump(exclude_none=True)
                )
            for setting in set(m.CreateCollection.model_fields) & set(m.CollectionParams.model_fields):
                if getattr(created, setting) is not None:
                    setattr(config.params, setting, getattr(created, setting))
        for setting, value in self._updated.get(name, {}).items():
            setattr(config.params, setting, value)
        return info.model_copy(update={"payload_schema": indexes, "config": config})

    def _behind(self, collection: str) -> str:
        return {found.alias_name: found.collection_name for found in self.client.get_aliases().aliases}.get(
            collection, collection
        )

    def create_collection(self, collection: str, body: m.CreateCollection) -> bool:
        if collection in {found.name for found in self.client.get_collections().collections}:
            raise Refusal(409, f"Wrong input: Collection `{collection}` already exists!")
        self.client.create_collection(
            collection, body.vectors, sparse_vectors_config=body.sparse_vectors, metadata=body.metadata
        )
        self._created[collection] = body
        return True

    def update_collection(self, collection: str, body: m.UpdateCollection) -> bool:
        """The parameters that only an update can set; metadata is merged."""
        self.client.update_collection(collection, metadata=body.metadata)
        if body.params is not None:
            changes = {name: getattr(body.params, name) for name in m.CollectionParamsDiff.model_fields}
            given = {name: value for name, value in changes.items() if value is not None}
            self._updated.setdefault(self._behind(collection), {}).update(given)
        return True

    def delete_collection(self, collection: str) -> bool:
        there = self.client.collection_exists(collection)
        if there:
            self.client.delete_collection(collection)
        self._created.pop(collection, None)
        self._updated.pop(collection, None)
        self._indexes.pop(collection, None)
        return there

    def aliases(self) -> m.CollectionsAliasesResponse:
        return self.client.get_aliases()

    def aliases_of(self, collection: str) -> m.CollectionsAliasesResponse:
        return self.client.get_collection_aliases(collection)

    def change_aliases(self, body: m.ChangeAliasesOperation) -> bool:
        return self.client.update_collection_aliases(body.actions)

    def create_index(self, collection: str, body: m.CreateFieldIndex) -> m.UpdateResult:
        self.client.get_collection(collection)
        self._indexes.setdefault(self._behind(collection), {})[body.field_name] = body.field_schema
        return done()

    def delete_index(self, collection: str, field: str) -> m.UpdateResult:
        self.client.get_collection(collection)
        self._indexes.get(self._behind(collection), {}).pop(field, None)
        return done()

    # -- points -----------------------------------------------------------------------------------------------------

    def scroll(self, collection: str, body: m.ScrollRequest) -> m.ScrollResult:
        self._understand(collection, body.filter)
        self._strictly(collection, "max_query_limit", body.limit or 10)
        records, following = self.client.scroll(
            collection,
            scroll_filter=body.filter,
            limit=10 if body.limit is None else body.limit,
            offset=body.offset,
            with_payload=True if body.with_payload is None else body.with_payload,
            with_vectors=body.with_vector or False,
        )
        return m.ScrollResult(points=records, next_page_offset=following)

    def retrieve(self, collection: str, body: m.PointRequest) -> list[m.Record]:
        return self.client.retrieve(
            collection,
            body.ids,
            with_payload=True if body.with_payload is None else body.with_payload,
            with_vectors=body.with_vector or False,
        )

    def count(self, collection: str, body: m.CountRequest) -> m.CountResult:
        self._understand(collection, body.filter)
        return self.client.count(collection, count_filter=body.filter, exact=True)

    def query(self, collection: str, body: m.QueryRequestBatch) -> list[m.QueryResponse]:
        # Local mode compares with everything and warns of settings for indexes.
        self._strictly(collection, "search_max_batchsize", len(body.searches))
        requests = [search.model_copy(update={"params": None}) for search in body.searches]
        return self.client.query_batch_points(collection, requests)

    def upsert(self, collection: str, body: m.PointsList | m.PointsBatch) -> m.UpdateResult:
        points = body.points if isinstance(body, m.PointsList) else body.batch
        if isinstance(body, m.PointsList):
            self._strictly(collection, "upsert_max_batchsize", len(body.points))
        self.client.upsert(collection, points, **self._condition(body))
        return done()

    def update_vectors(self, collection: str, body: m.UpdateVectors) -> m.UpdateResult:
        self._strictly(collection, "upsert_max_batchsize", len(body.points))
        self.client.update_vectors(collection, body.points, **self._condition(body))
        return done()

    def set_payload(self, collection: str, body: m.SetPayload) -> m.UpdateResult:
        self.client.set_payload(collection, body.payload, points=self._chosen(collection, body), key=body.key)
        return done()

    def overwrite_payload(self, collection: str, body: m.SetPayload) -> m.UpdateResult:
        self.client.overwrite_payload(collection, body.payload, points=self._chosen(collection, body))
        return done()

    def delete_payload(self, collection: str, body: m.DeletePayload) -> m.UpdateResult:
        self.client.delete_payload(collection, body.keys, points=self._chosen(collection, body))
        return done()

    def delete(self, collection: str, body: m.PointIdsList | m.FilterSelector) -> m.UpdateResult:
        self.client.delete(collection, body)
        return done()

    def batch(self, collection: str, body: m.UpdateOperations) -> list[m.UpdateResult]:
        """One after the other; the first that fails ends it."""
        return [self._operation(collection, operation) for operation in body.operations]

    def _operation(self, collection: str, operation: Any) -> m.UpdateResult:
        for kind, act in (
            (m.UpdateVectorsOperation, self.update_vectors),
            (m.SetPayloadOperation, self.set_payload),
            (m.DeletePayloadOperation, self.delete_payload),
            (m.UpsertOperation, self.upsert),
            (m.DeleteOperation, self.delete),
        ):
            if isinstance(operation, kind):
                (body,) = (getattr(operation, field) for field in kind.model_fields)
                return act(collection, body)
        raise Refusal(400, f"Format error in JSON body: {type(operation).__name__} is not known here")

    def _condition(self, body: Any) -> dict[str, Any]:
        """Servers before 1.16 read over what they do not know."""
        if self.release < (1, 16) or body.update_filter is None:
            return {}
        return {"update_filter": body.update_filter}

    def _chosen(self, collection: str, body: m.SetPayload | m.DeletePayload) -> Any:
        if body.points is not None:
            return body.points
        if body.filter is None:
            raise Refusal(422, "Either list of point ids or filter must be provided")
        self._understand(collection, body.filter)
        return body.filter

    def _strictly(self, collection: str, limit: str, size: int) -> None:
        created = self._created.get(self._behind(collection))
        strict = None if created is None else created.strict_mode_config
        most = getattr(strict, limit, None)
        if strict is not None and strict.enabled and most is not None and size > most:
            raise Refusal(400, f"Bad request: Limit exceeded {size} > {most} for {limit}")

    def _understand(self, collection: str, condition: m.Filter | None) -> None:
        indexed = self._indexes.get(self._behind(collection), {})
        created = self._created.get(self._behind(collection))
        strict = None if created is None else created.strict_mode_config
        if condition is not None and strict is not None and strict.enabled:
            for field in re.findall('"key":"([^"]*)"', condition.model_dump_json()):
                if strict.unindexed_filtering_retrieve is False and field not in indexed:
                    raise Refusal(400, f'Bad request: Index required but not found for "{field}"')
            for ids in re.findall(r'"has_id":\[([^]]*)\]', condition.model_dump_json()):
                self._strictly(collection, "condition_max_size", ids.count(",") + 1)
        if self.release < (1, 13) and condition is not None and "has_vector" in condition.model_dump_json():
            raise Refusal(400, "Format error in JSON body: data did not match any variant of untagged enum Condition")

    # -- half of it -------------------------------------------------------------------------------------------------

    def halved(self, collection: str, body: Any) -> Any:
        """A write of many points, cut down to the first half of them; of several writes, the first one halved."""
        if isinstance(body, m.UpdateOperations):
            operation = body.operations[0].model_copy()
            (field,) = type(operation).model_fields
            setattr(operation, field, self.halved(collection, getattr(operation, field)))
            return m.UpdateOperations(operations=[operation])
        if isinstance(body, m.PointsList | m.UpdateVectors):
            return body.model_copy(update={"points": body.points[: len(body.points) // 2]})
        chosen = getattr(body, "points", None)
        if chosen is None:
            records, _ = self.client.scroll(collection, scroll_filter=body.filter, limit=10**6, with_payload=False)
            chosen = [record.id for record in records]
        chosen = chosen[: len(chosen) // 2]
        if isinstance(body, m.FilterSelector):
            return m.PointIdsList(points=chosen)
        return body.model_copy(
            update={"points": chosen, "filter": None} if hasattr(body, "filter") else {"points": chosen}
        )


def done() -> m.UpdateResult:
    return m.UpdateResult(operation_id=1, status=m.UpdateStatus.COMPLETED)


def _over(config: Any, changes: Any) -> Any:
    return config if changes is None else config.model_copy(update=changes.model_dump(exclude_none=True))


UPSERT = TypeAdapter(m.PointInsertOperations)
SELECTOR = TypeAdapter(m.PointsSelector)
POINTS = "/collections/(?P<collection>[^/]+)/points"

# As in qdrant_client/http/api: method and path, the body's type, and what is done.
ROUTES: Sequence[tuple[str, Any, Callable[..., Any]]] = (
    ("GET /", None, Qdrant.info),
    ("GET /collections", None, Qdrant.collections),
    ("POST /collections/aliases", m.ChangeAliasesOperation, Qdrant.change_aliases),
    ("GET /aliases", None, Qdrant.aliases),
    ("GET /collections/(?P<collection>[^/]+)", None, Qdrant.collection),
    ("PUT /collections/(?P<collection>[^/]+)", m.CreateCollection, Qdrant.create_collection),
    ("PATCH /collections/(?P<collection>[^/]+)", m.UpdateCollection, Qdrant.update_collection),
    ("DELETE /collections/(?P<collection>[^/]+)", None, Qdrant.delete_collection),
    ("GET /collections/(?P<collection>[^/]+)/exists", None, Qdrant.exists),
    ("GET /collections/(?P<collection>[^/]+)/aliases", None, Qdrant.aliases_of),
    ("PUT /collections/(?P<collection>[^/]+)/index", m.CreateFieldIndex, Qdrant.create_index),
    ("DELETE /collections/(?P<collection>[^/]+)/index/(?P<field>[^/]+)", None, Qdrant.delete_index),
    (f"POST {POINTS}/scroll", m.ScrollRequest, Qdrant.scroll),
    (f"POST {POINTS}/batch", m.UpdateOperations, Qdrant.batch),
    (f"POST {POINTS}/count", m.CountRequest, Qdrant.count),
    (f"POST {POINTS}/query/batch", m.QueryRequestBatch, Qdrant.query),
    (f"POST {POINTS}/payload/delete", m.DeletePayload, Qdrant.delete_payload),
    (f"POST {POINTS}/payload", m.SetPayload, Qdrant.set_payload),
    (f"PUT {POINTS}/payload", m.SetPayload, Qdrant.overwrite_payload),
    (f"POST {POINTS}/delete", SELECTOR, Qdrant.delete),
    (f"PUT {POINTS}/vectors", m.UpdateVectors, Qdrant.update_vectors),
    (f"PUT {POINTS}", UPSERT, Qdrant.upsert),
    (f"POST {POINTS}", m.PointRequest, Qdrant.retrieve),
)
WRITES = (
    Qdrant.upsert, Qdrant.update_vectors, Qdrant.set_payload, Qdrant.overwrite_payload, Qdrant.delete_payload,
    Qdrant.delete, Qdrant.batch, Qdrant.create_index, Qdrant.delete_index,
)  # fmt: skip
HALVED = WRITES[:-2]


class Front:
    """The server, on a free port of this machine, until it is closed."""

    def __init__(
        self,
        location: str = ":memory:",
        *,
        port: int = 0,
        version: str = "1.16.0",
        api_key: str | None = None,
        read_only_key: str | None = None,
    ) -> None:
        self.qdrant = Qdrant(location, version)
        self.lock = threading.RLock()
        """Held while a request is served; local mode is not made for threads."""
        self.requests: list[str] = []
        """Each request, as "METHOD /path", in order."""
        self.before: Callable[[str, bytes], None] | None = None
        """Called with each request and its body before it is served, with nothing else going on: an application's
        chance to write, or the server's to refuse (`Refusal`)."""
        self.keys = {api_key: True, read_only_key: False} if api_key is not None else {}
        self._faults: list[Fault] = []
        self._chance: tuple[float, random.Random, Sequence[Fault]] | None = None
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", port), self)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def fail(self, what: What, **how: Any) -> None:
        """The next requests go wrong; see `Fault`."""
        self._faults.append(Fault(what, **how))

    def sprinkle(self, share: float, faults: Sequence[Fault], *, seed: int = 0) -> None:
        """From now on each request has this chance of one of these faults."""
        self._chance = (share, random.Random(seed), faults)

    @property
    def pending(self) -> bool:
        """Whether some fault has not struck yet."""
        return bool(self._faults)

    def heal(self) -> None:
        """No more faults; slow answers are let go."""
        self._faults.clear()
        self._chance = None
        self._released.set()
        self._released = threading.Event()

    def close(self) -> None:
        self.heal()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self.lock:
            self.qdrant.client.close()

    def fault(self, request: str) -> Fault | None:
        for fault in self._faults:
            if re.search(fault.path, request):
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                return fault
        if self._chance is not None:
            share, rng, faults = self._chance
            if rng.random() < share:
                fault = rng.choice(list(faults))
                return fault if re.search(fault.path, request) else None
        return None

    def serve(self, request: str, key: str | None, body: Any) -> tuple[Any, Fault | None]:
        """Result of a request, and what is to go wrong with its answer. The body is JSON, or one of the models."""
        with self.lock:
            self.requests.append(request)
            fault = self.fault(request)
            if fault is not None and fault.what == "drop":
                return None, fault
            if fault is not None and fault.what == "status":
                advice = [] if fault.retry_after is None else [("Retry-After", fault.retry_after)]
                raise Refusal(fault.status, f"a fault of the kind {fault.status}", advice)
            if self.before is not None:
                self.before(request, body if isinstance(body, bytes) else pydantic_core.to_json(body))
            self._check_key(request, key)
            for route, kind, act in ROUTES:
                if match := re.fullmatch(route, request):
                    return self._act(act, kind, {k: unquote(v) for k, v in match.groupdict().items()}, body, fault)
            raise Refusal(404, "", plain=True)

    def _act(
        self, act: Callable[..., Any], kind: Any, places: dict[str, str], body: Any, fault: Fault | None
    ) -> tuple[Any, Fault | None]:
        words: list[Any] = []
        if kind is not None:
            try:
                validate = kind.validate_json if isinstance(kind, TypeAdapter) else kind.model_validate_json
                words = [validate(body) if isinstance(body, bytes) else body]
            except ValidationError as error:
                raise Refusal(400, f"Format error in JSON body: {error.errors()[0]['msg']}") from error
        half = fault is not None and fault.what == "half" and act in HALVED
        torn = fault is not None and fault.what == "torn" and act is Qdrant.batch
        if half:
            words = [self.qdrant.halved(places["collection"], words[0])]
        if torn:
            words = [m.UpdateOperations(operations=words[0].operations[:-1])]
        try:
            result = act(self.qdrant, *places.values(), *words) if not half or not _empty(words[0]) else None
        except KeyError as error:
            raise Refusal(404, f"Not found: No point with id {error.args[0]} found") from error
        except ValueError as error:
            if re.fullmatch("Collection .* not found", str(error)):
                name = places.get("collection", str(error).split()[1])
                raise Refusal(404, f"Not found: Collection `{name}` doesn't exist!") from error
            raise Refusal(400, str(error) if "Wrong input" in str(error) else f"Wrong input: {error}") from error
        if half or torn:
            raise Refusal(500, "Service internal error: the disk is full")
        if fault is not None and fault.what == "acknowledged" and act in WRITES:
            late = m.UpdateResult(operation_id=1, status=m.UpdateStatus.WAIT_TIMEOUT)
            result = [done(), late] if act is Qdrant.batch else late
        if fault is not None and fault.spoil is not None:
            result = fault.spoil(result)
        return result, fault

    def _check_key(self, request: str, given: str | None) -> None:
        if not self.keys or request == "GET /":
            return
        if given is None:
            raise Refusal(401, "Must provide an API key or an Authorization bearer token", plain=True)
        if given not in self.keys:
            raise Refusal(401, "Invalid API key or JWT", plain=True)
        reads = request.startswith("GET") or re.fullmatch(f"POST {POINTS}(/scroll|/count|/query/batch|)", request)
        if not self.keys[given] and not reads:
            raise Refusal(403, "Forbidden: Global manage access is required")

    def hold(self) -> None:
        """Until somebody calls `heal`."""
        self._released.wait(60)


def _empty(body: Any) -> bool:
    return not getattr(body, "points", True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], front: Front) -> None:
        self.front = front
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the client may leave at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        began = time.perf_counter()
        front = self.server.front
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {urlsplit(self.path).path}"
        fault: Fault | None = None
        try:
            result, fault = front.serve(request, self.headers.get("api-key"), body)
            if fault is not None and fault.what in ("drop", "drop_after"):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault is not None and fault.what == "slow":
                front.hold()
            if request == "GET /":  # the one answer that is not wrapped
                answer = pydantic_core.to_json(result)
            else:
                elapsed = time.perf_counter() - began
                answer = pydantic_core.to_json({"result": result, "status": "ok", "time": elapsed})
            if fault is not None and fault.what == "garbage":
                answer = b"<html><body>welcome to my proxy</body></html>"
            self._answer(200, answer)
        except Refusal as refusal:
            said: Any = {"status": {"error": str(refusal)}, "time": time.perf_counter() - began}
            answer = str(refusal).encode() if refusal.plain else pydantic_core.to_json(said)
            self._answer(refusal.status, answer, refusal.headers)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _answer(self, status: int, content: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def qdrant_front(location: str = ":memory:", **settings: Any) -> Iterator[Front]:
    front = Front(location, **settings)
    try:
        yield front
    finally:
        front.close()


@contextmanager
def qdrant_process(location: str = ":memory:", *, port: int = 0, version: str = "1.16.0") -> Iterator[str]:
    """The url of a front in a process of its own, which outlives those that use it and is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.qdrant_front", location, str(port), version],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said, "the front did not come up"
            yield f"http://127.0.0.1:{int(said)}"
        finally:
            process.kill()


def main(location: str = ":memory:", port: str = "0", version: str = "1.16.0") -> None:
    warnings.filterwarnings("ignore", message="Local mode is not recommended", category=UserWarning)
    with qdrant_front(location, port=int(port), version=version) as front:
        print(front.port, flush=True)
        sys.stdin.read()  # until whoever started this closes it


if __name__ == "__main__":
    main(*sys.argv[1:])
