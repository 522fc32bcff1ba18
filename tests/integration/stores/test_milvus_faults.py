"""What the Milvus adapter says to bad input and to a server that is not there, and that it changes nothing then.

Most of it against Milvus Lite, also as a server over TCP; what only a real server does, there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from migrator.adapters.base import Page, Store, StoreError, StoreRejected, StoreUnavailable
from migrator.adapters.milvus.connection import Connection
from migrator.adapters.milvus.reader import PARTITION
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, payloads_of, unit_vectors
from tests.integration.stores.test_milvus import drop_new
from tests.line import Line, line_to
from tests.milvus_server import ON_THE_SERVER, MilvusServer

TIMEOUT = 1.0


def refusal_of(config: dict[str, Any], kind: type[StoreError] = StoreRejected) -> str:
    """The one line that opening a store ends with."""
    with pytest.raises(kind) as refusal:
        open_store({"kind": "milvus", "timeout": 5, **config}, write=True)
    said = str(refusal.value)
    assert "\n" not in said
    return said


def make(
    client: MilvusClient,
    name: str,
    *vectors: tuple[str, DataType],
    index: bool = True,
    more: dict[str, Any] | None = None,
) -> None:
    """A collection with these vector fields and one text."""
    schema = client.create_schema(enable_dynamic_field=True, **(more or {}))
    schema.add_field("key", DataType.INT64, is_primary=True)
    parameters = client.prepare_index_params()
    for field, kind in vectors:
        sparse = kind == DataType.SPARSE_FLOAT_VECTOR
        schema.add_field(field, kind, **({} if sparse else {"dim": DIM}))
        metric = {DataType.BINARY_VECTOR: "HAMMING", DataType.SPARSE_FLOAT_VECTOR: "IP"}.get(kind, "COSINE")
        types = {DataType.BINARY_VECTOR: "BIN_FLAT", DataType.SPARSE_FLOAT_VECTOR: "SPARSE_INVERTED_INDEX"}
        parameters.add_index(field, index_type=types.get(kind, "FLAT"), metric_type=metric)
    schema.add_field("path", DataType.VARCHAR, max_length=400)
    client.create_collection(name, schema=schema)
    if index:
        client.create_index(name, parameters, sync=False)


FLOAT = ("embedding", DataType.FLOAT_VECTOR)


def fill(client: MilvusClient, name: str, items: int = 5) -> None:
    vectors = unit_vectors(items)
    client.upsert(name, [{"key": key, "embedding": vectors[key], "path": f"{key}.png"} for key in range(items)])


# -- Milvus Lite --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("faults") / "milvus.db")


@pytest.fixture(scope="module")
def lite(file: str) -> Iterator[MilvusClient]:
    client = MilvusClient(file)
    kept = Connection({"uri": file})
    yield client
    client.close()
    kept.release()


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a collection behind."""
    name = next((name for name in ("lite", "server_client") if name in request.fixturenames), None)
    client = request.getfixturevalue(name) if name else None
    yield
    if client is not None:
        drop_new(client, set())


@pytest.mark.parametrize(
    ("vectors", "wanted", "said"),
    [
        ([FLOAT], "image", "no vector field 'image', but embedding: correct `vector`"),
        ([FLOAT], "path", "no vector field 'path', but embedding: correct `vector`"),
        ([FLOAT, ("other", DataType.FLOAT_VECTOR)], None, "vector fields embedding, other: name one with `vector`"),
        ([("bits", DataType.BINARY_VECTOR)], None, "bits is a BINARY_VECTOR: only FLOAT_VECTOR"),
        ([("half", DataType.FLOAT16_VECTOR)], None, "half is a FLOAT16_VECTOR: only FLOAT_VECTOR"),
        ([("brain", DataType.BFLOAT16_VECTOR)], None, "brain is a BFLOAT16_VECTOR: only FLOAT_VECTOR"),
        ([("words", DataType.SPARSE_FLOAT_VECTOR)], None, "words is a SPARSE_FLOAT_VECTOR: only FLOAT_VECTOR"),
        ([("bytes", DataType.INT8_VECTOR)], None, "bytes is a INT8_VECTOR: only FLOAT_VECTOR"),
    ],
    ids=["missing", "no-vector", "several", "binary", "float16", "bfloat16", "sparse", "int8"],
)
def test_vector_fields_that_cannot_be_migrated(
    lite: MilvusClient, file: str, vectors: list[tuple[str, DataType]], wanted: str | None, said: str
) -> None:
    try:
        make(lite, "wrong", *vectors, index=False)
    except Exception as error:
        pytest.skip(f"Milvus Lite has no such collections: {error}")
    refusal = refusal_of({"uri": file, "collection": "wrong", **({"vector": wanted} if wanted else {})})
    assert said in refusal


def test_one_of_several_vector_fields_is_written_and_the_other_left_alone(lite: MilvusClient, file: str) -> None:
    make(lite, "two", FLOAT, ("other", DataType.FLOAT_VECTOR))
    vectors = unit_vectors(4)
    lite.upsert(
        "two", [{"key": key, "embedding": vectors[key], "other": vectors[3 - key], "path": ""} for key in range(4)]
    )
    with closing(
        open_store({"kind": "milvus", "uri": file, "collection": "two", "vector": "other"}, write=True)
    ) as two:
        page = two.scan(after=None, limit=10)
        np.testing.assert_array_equal(page.vectors, vectors[::-1])
        assert list(two.write_vectors(page.ids, unit_vectors(4, seed=2), "new", expected=page).written) == [0, 1, 2, 3]
        with closing(two.create_like("two_b", dim=DIM)) as copy:
            copy.insert(Page(page.ids, unit_vectors(4, seed=3), page.payloads, [None] * 4))
            np.testing.assert_array_equal(copy.scan(after=None, limit=10).vectors, unit_vectors(4, seed=3))
    for name in ("two", "two_b"):
        rows = lite.query(name, filter="key >= 0", output_fields=["*"], strict_float32=True)
        for row in rows:
            np.testing.assert_array_equal(np.array(row["embedding"], np.float32), vectors[row["key"]])


def test_a_collection_without_index(lite: MilvusClient, file: str) -> None:
    make(lite, "bare", FLOAT, index=False)
    assert "bare.embedding has no index: create one" in refusal_of({"uri": file, "collection": "bare"})


def test_names_that_lead_nowhere(lite: MilvusClient, file: str) -> None:
    make(lite, "lost", FLOAT)
    lite.create_alias("lost", "found")
    lite.drop_collection("lost")
    for name in ("found", "lost", "nothing"):
        assert f"no collection or alias {name!r}" in refusal_of({"uri": file, "collection": name})
    for name in ("", "no name", "x" * 300, "'"):
        refusal_of({"uri": file, "collection": name})


def test_a_collection_is_no_alias(lite: MilvusClient, file: str) -> None:
    make(lite, "one", FLOAT)
    make(lite, "two", FLOAT)
    lite.create_alias("one", "name")
    with closing(open_store({"kind": "milvus", "uri": file, "collection": "one"}, write=True)) as store:
        for alias, to in (("one", "two"), ("two", "one"), ("name", "name"), ("name", "none"), ("none", "two")):
            with pytest.raises(StoreRejected):
                store.swap_alias(alias, to=to)
    assert lite.describe_collection("name")["collection_name"] == "one"
    assert sorted(lite.list_collections()) == ["one", "two"]


def test_settings_that_make_no_sense(file: str) -> None:
    assert "no setting 'adress'" in refusal_of({"uri": file, "adress": "x", "collection": "x"})
    assert "needs `collection`" in refusal_of({"uri": file})
    assert "needs `uri`" in refusal_of({"collection": "x"})


def test_files_that_milvus_lite_did_not_make(tmp_path: Path) -> None:
    assert "does not exist" in refusal_of({"uri": str(tmp_path / "none.db"), "collection": "x"})
    text = tmp_path / "text.db"
    text.write_text("SQLite format 3")
    folder = tmp_path / "images.db"
    folder.mkdir()
    (folder / "1.png").touch()
    for path in (text, folder):
        assert "was not made by Milvus Lite 3" in refusal_of({"uri": str(path), "collection": "x"})
    assert [path.name for path in folder.iterdir()] == ["1.png"]
    assert text.read_text() == "SQLite format 3"


def test_a_damaged_file(tmp_path: Path) -> None:
    from milvus_lite import server_manager_instance

    uri = str(tmp_path / "milvus.db")
    client = MilvusClient(uri)
    make(client, "things", FLOAT)
    fill(client, "things")
    client.close()
    server_manager_instance.release_server(uri)
    (data,) = Path(uri).rglob("*.parquet")
    data.write_bytes(data.read_bytes()[:100])
    refusal_of({"uri": uri, "collection": "things"})


def test_fields_of_all_kinds_survive_a_write_and_a_copy(lite: MilvusClient, file: str) -> None:
    schema = lite.create_schema(enable_dynamic_field=True)
    rows = own_rows(lite, schema)
    schema.add_field("maybe", DataType.INT64, nullable=True)
    schema.add_field("usual", DataType.INT64, default_value=7)
    index_and_fill(lite, "own", schema, [{**row, "maybe": None if row["i8"] else 3} for row in rows])
    assert_payloads_survive(lite, file, "own", stamp="new")


def own_rows(client: MilvusClient, schema: Any) -> list[dict[str, Any]]:
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=50)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("json", DataType.JSON)
    schema.add_field("numbers", DataType.ARRAY, element_type=DataType.INT64, max_capacity=10)
    schema.add_field("words", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=10, max_length=20)
    for name, kind in (("b", DataType.BOOL), ("i8", DataType.INT8), ("f", DataType.FLOAT), ("d", DataType.DOUBLE)):
        schema.add_field(name, kind)
    return [
        {
            "key": f"k{row}",
            "embedding": vector,
            "json": {"a": [1, {"b": None}], "text": "ä\"'\\", "row": row},
            "numbers": [1, 2**40, -row],
            "words": ["x", ""],
            "b": bool(row % 2),
            "i8": -row,
            "f": 0.1 * row,
            "d": 0.1 * row,
        }
        for row, vector in enumerate(unit_vectors(6))
    ]


def index_and_fill(client: MilvusClient, name: str, schema: Any, rows: list[dict[str, Any]]) -> None:
    parameters = client.prepare_index_params()
    parameters.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema)
    client.create_index(name, parameters, sync=False)
    client.load_collection(name)
    client.upsert(name, rows)


def raw(client: MilvusClient, name: str) -> dict[Any, Any]:
    """Everything but vector and stamp, as the application reads it."""
    client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    rows = client.query(name, filter="", output_fields=["*"], limit=100, consistency_level="Strong")
    return {
        row["key"]: {name: str(value) for name, value in row.items() if name not in ("embedding", "_migrator")}
        for row in rows
    }


def assert_payloads_survive(client: MilvusClient, uri: str, name: str, *, stamp: str | None) -> None:
    """In place and in a copy of another dimension."""
    before = raw(client, name)
    with closing(open_store({"kind": "milvus", "uri": uri, "collection": name}, write=True)) as store:
        page = store.scan(after=None, limit=100)
        assert len(page) == len(before) == 6
        report = store.write_vectors(page.ids, unit_vectors(6, seed=3), stamp, expected=page)
        assert list(report.written) == list(page.ids)
        assert raw(client, name) == before
        copied = Page(page.ids, np.ones((6, 2 * DIM), np.float32), page.payloads, [None] * 6)
        for _ in range(2):
            with closing(store.create_like(f"{name}_copy", dim=2 * DIM)) as copy:
                assert list(copy.insert(copied).written) == list(page.ids)
                assert raw(client, f"{name}_copy") == before
                assert copy.count() == 6


def test_rows_stay_in_their_partitions(lite: MilvusClient, file: str) -> None:
    assert_rows_stay_in_their_partitions(lite, file)


def assert_rows_stay_in_their_partitions(client: MilvusClient, uri: str) -> None:
    """In place and in a copy."""
    vectors = unit_vectors(6)
    make(client, "parted", FLOAT)
    for name in ("a", "b"):
        client.create_partition("parted", name)
    client.load_collection("parted")
    places = {"_default": (0, 1), "a": (2, 3), "b": (4, 5)}
    for name, keys in places.items():
        rows = [{"key": key, "embedding": vectors[key], "path": f"{key}.png", "more": [1, key]} for key in keys]
        client.upsert("parted", rows, partition_name=name)

    def lie_in(collection: str) -> dict[str, tuple[int, ...]]:
        found = {
            name: client.query(
                collection,
                filter="key >= 0",
                output_fields=["key"],
                partition_names=[name],
                consistency_level="Strong",
            )
            for name in client.list_partitions(collection)
        }
        return {name: tuple(sorted(row["key"] for row in rows)) for name, rows in found.items()}

    assert lie_in("parted") == places
    payloads = [
        {"key": key, "path": f"{key}.png", "more": [1, key], PARTITION: name}
        for name, keys in places.items()
        for key in keys
    ]
    with closing(open_store({"kind": "milvus", "uri": uri, "collection": "parted"}, write=True)) as store:
        page = store.scan(after=None, limit=10)
        assert [dict(payload) for payload in page.payloads] == payloads
        report = store.write_vectors(page.ids, unit_vectors(6, seed=1), "new", expected=page)
        assert list(report.written) == list(range(6))
        assert (lie_in("parted"), store.count(), store.describe().count) == (places, 6, 6)
        assert store.count(stamp="new") == 6
        for _ in range(2):
            with closing(store.create_like("parted_copy", dim=DIM)) as copy:
                assert list(copy.insert(page).written) == list(range(6))
                assert lie_in("parted_copy") == places
                assert [dict(payload) for payload in copy.scan(after=None, limit=10).payloads] == payloads


# -- a server that is not there, or not well ----------------------------------------------------------------------


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = monotonic()
    assert "did not answer" in refusal_of({"uri": f"http://127.0.0.1:{port}", "collection": "x"}, StoreUnavailable)
    assert monotonic() - began < 10


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """To a Milvus Lite that plays the server."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    running, engine, port = start_server_in_thread(str(tmp_path_factory.mktemp("line") / "milvus.db"), port=0)
    with line_to(port) as made:
        client = MilvusClient(f"http://127.0.0.1:{port}")
        make(client, "things", FLOAT)
        client.load_collection("things")
        fill(client, "things")
        client.close()
        yield made
    running.stop(grace=None).wait()
    engine.close()


def on_the_line(line: Line) -> dict[str, Any]:
    return {"kind": "milvus", "uri": f"http://127.0.0.1:{line.port}", "collection": "things", "timeout": TIMEOUT}


REQUESTS: dict[str, Callable[[Store], object]] = {
    "describe": lambda store: store.describe(),
    "scan": lambda store: store.scan(after=None, limit=3),
    "read": lambda store: store.read([1, 2]),
    "count": lambda store: store.count(),
    "write": lambda store: store.write_vectors([1, 2], unit_vectors(2, seed=9), "lost"),
    "insert": lambda store: store.insert(Page([7], unit_vectors(1), payloads_of([7]), [None])),
    "delete": lambda store: store.delete([1]),
    "create_like": lambda store: store.create_like("other", dim=DIM),
    "swap": lambda store: store.swap_alias("a", to="b"),
}


@pytest.mark.parametrize("fault", ["fall_silent", "cut"])
def test_every_request_ends_in_time_and_the_store_goes_on_afterwards(line: Line, fault: str) -> None:
    with closing(open_store(on_the_line(line), write=True)) as store:
        before = store.scan(after=None, limit=10)
        assert len(before) == 5
        getattr(line, fault)()
        for name, request in REQUESTS.items():
            began = monotonic()
            with pytest.raises(StoreUnavailable, match="did not answer") as refusal:
                request(store)
            assert monotonic() - began < 4 * TIMEOUT, name
            assert "\n" not in str(refusal.value)
        # Also where the client keeps a connection to the address that once worked.
        began = monotonic()
        refusal_of({**on_the_line(line), "timeout": TIMEOUT}, StoreUnavailable)
        assert monotonic() - began < 4 * TIMEOUT
        line.mend()
        deadline = monotonic() + 60
        while True:
            try:
                after = store.scan(after=None, limit=10)
                break
            except StoreUnavailable:
                assert monotonic() < deadline, "it does not come back"
    assert (after.ids, after.stamps) == (before.ids, before.stamps)
    np.testing.assert_array_equal(after.vectors, before.vectors)


class Answer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no stubs
    """A server that has one answer for everything."""

    def __init__(self, code: grpc.StatusCode, said: str) -> None:
        self._code, self._said = code, said

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        def answer(_request: bytes, context: grpc.ServicerContext) -> None:
            context.abort(self._code, self._said)

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.parametrize(
    ("code", "said", "kind", "expected"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "auth check failure", StoreRejected, "correct `token`"),
        (grpc.StatusCode.PERMISSION_DENIED, "permission deny", StoreRejected, "correct `token`"),
        (grpc.StatusCode.UNIMPLEMENTED, "unknown service", StoreRejected, "is no Milvus"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests", StoreUnavailable, "did not answer"),
        (grpc.StatusCode.UNAVAILABLE, "starting", StoreUnavailable, "did not answer"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_answers_of_the_wire(code: grpc.StatusCode, said: str, kind: type[StoreError], expected: str) -> None:
    answering = grpc.server(futures.ThreadPoolExecutor(2))
    answering.add_generic_rpc_handlers((Answer(code, said),))
    port = answering.add_insecure_port("127.0.0.1:0")
    answering.start()
    try:
        began = monotonic()
        uri = f"http://127.0.0.1:{port}"
        assert expected in refusal_of({"uri": uri, "collection": "x", "token": "me:wrong", "timeout": 2}, kind)
        assert monotonic() - began < 8
    finally:
        answering.stop(grace=None).wait()


# -- a real server ------------------------------------------------------------------------------------------------


@ON_THE_SERVER
def test_on_a_server_rows_stay_in_their_partitions(server: MilvusServer, server_client: MilvusClient) -> None:
    """Written without its partition, a row would lie in the default one a second time."""
    assert_rows_stay_in_their_partitions(server_client, server.uri)


@ON_THE_SERVER
def test_on_a_server_fields_of_all_kinds_survive(server: MilvusServer, server_client: MilvusClient) -> None:
    """Without a dynamic field, and with a partition key."""
    schema = server_client.create_schema(enable_dynamic_field=False)
    rows = own_rows(server_client, schema)
    schema.add_field("tenant", DataType.VARCHAR, max_length=50, is_partition_key=True)
    index_and_fill(server_client, "own", schema, [{**row, "tenant": f"t{row['i8'] % 3}"} for row in rows])
    assert_payloads_survive(server_client, server.uri, "own", stamp=None)
    with pytest.raises(StoreRejected, match="no dynamic field"):
        open_and(server.uri, "own", lambda store: store.count(stamp="s"))


def open_and(uri: str, name: str, call: Callable[[Store], object], **more: Any) -> object:
    with closing(open_store({"kind": "milvus", "uri": uri, "collection": name, **more}, write=True)) as store:
        return call(store)


@ON_THE_SERVER
def test_on_a_server_another_database(server: MilvusServer, server_client: MilvusClient) -> None:
    server_client.create_database("other")
    with closing(MilvusClient(server.uri, db_name="other")) as client:
        make(client, "inside", FLOAT)
        client.load_collection("inside")
        fill(client, "inside")
        client.create_alias("inside", "name")
        config = {"kind": "milvus", "uri": server.uri, "collection": "name"}
        with closing(open_store({**config, "database": "other"}, write=True)) as store:
            info = store.describe()
            assert (info.name.endswith("/other/inside"), info.alias, info.count) == (True, "name", 5)
            page = store.scan(after=None, limit=10)
            assert list(store.write_vectors(page.ids, unit_vectors(5), "new", expected=page).written) == list(range(5))
            with closing(store.create_like("inside_2", dim=DIM)) as copy:
                copy.insert(page)
                store.swap_alias("name", to="inside_2")
                assert client.describe_collection("name")["collection_name"] == "inside_2"
                with pytest.raises(StoreRejected, match="the alias 'name' leads to it"):
                    copy.drop()
                store.swap_alias("name", to="inside")
                copy.drop()
            assert client.list_collections() == ["inside"]
        assert "in database 'none'" in refusal_of({**config, "database": "none"})
        assert "has no collection or alias 'name': " in refusal_of(config)
        client.drop_alias("name")
        client.drop_collection("inside")
    server_client.drop_database("other")


@pytest.mark.parametrize(
    "kind",
    [DataType.BINARY_VECTOR, DataType.FLOAT16_VECTOR, DataType.BFLOAT16_VECTOR, DataType.SPARSE_FLOAT_VECTOR],
    ids=lambda kind: kind.name,
)
@ON_THE_SERVER
def test_on_a_server_vectors_that_cannot_be_migrated(
    server: MilvusServer, server_client: MilvusClient, kind: DataType
) -> None:
    try:
        make(server_client, "wrong", ("vector", kind), index=False)
    except Exception as error:
        pytest.skip(f"Milvus 2.3.5 has no such collections: {error}")
    assert f"vector is a {kind.name}" in refusal_of({"uri": server.uri, "collection": "wrong"})


@ON_THE_SERVER
def test_on_a_server_what_is_not_ready(server: MilvusServer, server_client: MilvusClient) -> None:
    make(server_client, "bare", FLOAT, index=False)
    assert "not loaded" in refusal_of({"uri": server.uri, "collection": "bare"})
    make(server_client, "idle", FLOAT)
    assert "collection idle is not loaded: load it" in refusal_of({"uri": server.uri, "collection": "idle"})
    server_client.load_collection("idle")
    fill(server_client, "idle")
    with closing(open_store({"kind": "milvus", "uri": server.uri, "collection": "idle"}, write=True)) as store:
        server_client.release_collection("idle")
        with pytest.raises(StoreUnavailable, match="not loaded any more"):
            store.scan(after=None, limit=10)
        with pytest.raises(StoreUnavailable, match="not loaded any more"):
            store.write_vectors([1], unit_vectors(1), "new")


@pytest.mark.long
@ON_THE_SERVER
def test_on_a_server_rows_too_large_for_one_message(server: MilvusServer, server_client: MilvusClient) -> None:
    """Pages and writes are halved until they fit."""
    schema = server_client.create_schema(enable_dynamic_field=True)
    schema.add_field("key", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535)
    items = 2_000
    text = "x" * 60_000
    index_and_fill(server_client, "large", schema, [])
    for start in range(0, items, 500):
        rows = [
            {"key": key, "embedding": vector, "text": text}
            for key, vector in zip(range(start, start + 500), unit_vectors(500), strict=True)
        ]
        server_client.upsert("large", rows)
    config = {"kind": "milvus", "uri": server.uri, "collection": "large", "timeout": 60}
    with closing(open_store(config, write=True)) as store:
        page = store.scan(after=None, limit=items)
        assert list(page.ids) == list(range(items))
        assert len(store.read(page.ids)) == items
        assert len(store.write_vectors(page.ids, unit_vectors(items), "new", expected=page).written) == items
        with closing(store.create_like("large_copy", dim=DIM)) as copy:
            assert len(copy.insert(page).written) == items
            assert copy.count() == items
