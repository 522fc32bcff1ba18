"""Nothing of a Milvus collection is lost in a second one like it, and what cannot be carried over is refused at once.

What is right is told by pymilvus: its descriptions, its queries and its searches of both collections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from pymilvus import DataType, Function, FunctionType, MilvusClient
from pymilvus.client.types import LoadState

from migrator.adapters.base import Page, StoreRejected
from migrator.adapters.milvus.collection import Description, create, difference, wanted
from migrator.adapters.milvus.connection import Connection
from migrator.adapters.milvus.reader import plain_value
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, unit_vectors
from tests.integration.stores.test_milvus import drop_new
from tests.milvus_server import ON_THE_SERVER, MilvusServer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("whole") / "milvus.db")


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


def opened(uri: str, name: str, *, write: bool = True, **more: Any) -> Any:
    config = {"kind": "milvus", "uri": uri, "collection": name, "vector": "embedding", **more}
    return closing(open_store(config, write=write))


def make(
    client: MilvusClient,
    name: str,
    *fields: tuple[str, DataType, dict[str, Any]],
    functions: tuple[Function, ...] = (),
    indexes: tuple[dict[str, Any], ...] = (),
    dynamic: bool = False,
    description: str = "",
    **more: Any,
) -> None:
    """A collection with a key, an `embedding` and these fields."""
    schema = client.create_schema(enable_dynamic_field=dynamic, description=description)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM, description="made by the encoder")
    for field, kind, options in fields:
        schema.add_field(field, kind, **options)
    for function in functions:
        schema.add_function(function)
    parameters = client.prepare_index_params()
    parameters.add_index("embedding", index_type="HNSW", metric_type="COSINE", params={"M": 8, "efConstruction": 64})
    for index in indexes:
        parameters.add_index(**index)
    client.create_collection(name, schema=schema, **more)
    client.create_index(name, parameters, sync=False)
    client.load_collection(name)


OWN = {"collection_name", "collection_id", "created_timestamp", "update_timestamp", "aliases", "schema_version"}


def described(client: MilvusClient, name: str, *, dim: int) -> dict[str, Any]:
    """What pymilvus tells of a collection, with `dim` in the place of its own one."""
    found = {key: value for key, value in client.describe_collection(name).items() if key not in OWN}
    found["fields"] = [
        {
            **{key: str(value) for key, value in field.items() if key != "field_id"},
            "params": {**field["params"], **({"dim": dim} if field["name"] == "embedding" else {})},
        }
        for field in found["fields"]
    ]
    found["functions"] = [
        {key: str(function[key]) for key in ("name", "type", "params", "input_field_names", "output_field_names")}
        for function in found["functions"]
    ]
    found["indexes"] = [
        {key: value for key, value in client.describe_index(name, index).items() if "rows" not in key}
        for index in sorted(client.list_indexes(name))
    ]
    found["partitions"] = sorted(client.list_partitions(name))
    return found


def assert_carried(client: MilvusClient, uri: str, name: str, *, dim: int = 2 * DIM, **more: Any) -> None:
    """The dry run passes, from a store opened for reading, and leaves nothing; the copy is what the source is."""
    before = set(client.list_collections())
    with opened(uri, name, write=False, **more) as store:
        store.check_create_like(dim=dim)
    assert set(client.list_collections()) == before
    with opened(uri, name, **more) as store:
        for _ in range(2):  # the second time as after a kill
            store.create_like(f"{name}_copy", dim=dim).close()
    assert described(client, f"{name}_copy", dim=dim) == described(client, name, dim=dim)
    assert client.get_load_state(f"{name}_copy")["state"] == LoadState.Loaded


def assert_refused(client: MilvusClient, uri: str, name: str, said: str, *, dim: int = DIM, **more: Any) -> None:
    """By the dry run and by the call itself, which leave nothing behind."""
    before = set(client.list_collections())
    for write, call in ((False, "check_create_like"), (True, "create_like")):
        with opened(uri, name, write=write, **more) as store, pytest.raises(StoreRejected, match=said) as refusal:
            getattr(store, call)(*([f"{name}_copy"] if call == "create_like" else []), dim=dim)
        assert "\n" not in str(refusal.value)
        assert set(client.list_collections()) == before


# -- what belongs to a collection ---------------------------------------------------------------------------------


def make_with_everything(client: MilvusClient, name: str, *, scalar_index: str) -> None:
    make(
        client,
        name,
        ("path", DataType.VARCHAR, {"max_length": 65_535, "description": "below images.root"}),
        ("count", DataType.INT64, {"default_value": 0}),
        ("tags", DataType.ARRAY, {"element_type": DataType.VARCHAR, "max_capacity": 4096, "max_length": 20}),
        ("more", DataType.JSON, {}),
        ("tenant", DataType.VARCHAR, {"max_length": 20, "is_partition_key": True}),
        indexes=({"field_name": "path", "index_type": scalar_index, "index_name": "by_path"},),
        dynamic=True,
        description="pictures of products",
        properties={"collection.ttl.seconds": 3600, "mmap.enabled": True, "owner": "search team"},
        consistency_level="Session",
        num_partitions=7,
        num_shards=2,
    )


def test_what_milvus_lite_tells_is_carried(lite: MilvusClient, file: str) -> None:
    make_with_everything(lite, "all", scalar_index="INVERTED")
    assert lite.describe_collection("all")["properties"]["collection.ttl.seconds"] == "3600"
    assert_carried(lite, file, "all")
    lite.alter_collection_properties("all", {"collection.ttl.seconds": 60})
    lite.drop_collection("all_copy")
    assert_carried(lite, file, "all", dim=DIM)
    assert lite.describe_collection("all_copy")["properties"]["collection.ttl.seconds"] == "60"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DataType.INT64, {"nullable": True}),
        (DataType.VARCHAR, {"max_length": 9, "default_value": ""}),
        (DataType.BOOL, {"default_value": False}),
        (DataType.FLOAT, {"default_value": 0.5, "nullable": True}),
        (DataType.VARCHAR, {"max_length": 9, "enable_analyzer": True, "enable_match": True}),
        (DataType.GEOMETRY, {"nullable": True}),
        (DataType.TIMESTAMPTZ, {}),
        (DataType.FLOAT_VECTOR, {"dim": 3}),
        (DataType.SPARSE_FLOAT_VECTOR, {}),
    ],
    ids=["nullable", "empty-text", "false", "float", "analyzer", "geometry", "timestamp", "dense", "sparse"],
)
def test_fields_of_every_kind_are_carried(
    lite: MilvusClient, file: str, kind: DataType, options: dict[str, Any]
) -> None:
    make(lite, "one", ("other", kind, options))
    assert_carried(lite, file, "one")


def test_partitions_are_carried(lite: MilvusClient, file: str) -> None:
    make(lite, "parted")
    for name in ("summer", "winter"):
        lite.create_partition("parted", name)
    assert_carried(lite, file, "parted")
    lite.create_partition("parted", "autumn")  # before the call that was killed is repeated
    with opened(file, "parted") as store:
        store.create_like("parted_copy", dim=2 * DIM).close()
    assert lite.has_partition("parted_copy", "autumn")


def client_that(lose: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """`create_collection` of a server, or of a client, that does not take everything."""
    create = MilvusClient.create_collection

    def called(client: MilvusClient, name: str, **options: Any) -> Any:
        lose(options)
        return create(client, name, **options)

    return called


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (
            lambda options: options.pop("properties"),
            "property 'collection.ttl.seconds' is missing",
        ),
        (lambda options: options.update(properties={"owner": "none"}), "property 'collection.ttl.seconds' is missing"),
        (
            lambda options: options.update(properties={**options["properties"], "owner": "x"}),
            "'owner' is 'search team'",
        ),
        (lambda options: setattr(options["schema"], "enable_dynamic_field", False), "dynamic_field is 'true'"),
        (lambda options: setattr(options["schema"].fields[3], "default_value", None), "field 'count' default_value"),
        (
            lambda options: options["schema"].fields[2].params.update(max_length=50),
            "field 'path' max_length is '65535'",
        ),
        (lambda options: options["schema"].fields[4].params.update(max_capacity=5), "field 'tags' max_capacity"),
        (lambda options: options["schema"].fields.pop(5), "field 'more' is missing"),
    ],
    ids=["properties", "some", "property", "dynamic", "default", "length", "capacity", "field"],
)
def test_whatever_is_lost_on_the_way_is_named(
    lite: MilvusClient,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    lose: Callable[[dict[str, Any]], Any],
    said: str,
) -> None:
    make_with_everything(lite, "all", scalar_index="INVERTED")
    monkeypatch.setattr(MilvusClient, "create_collection", client_that(lose))
    assert_refused(lite, file, "all", said)


def test_a_lost_index_or_partition_is_named(lite: MilvusClient, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_with_everything(lite, "all", scalar_index="INVERTED")
    make(lite, "parted")
    lite.create_partition("parted", "summer")
    create = MilvusClient.create_index

    def without_scalars(client: MilvusClient, name: str, parameters: Any, **options: Any) -> None:
        if any(index.field_name == "embedding" for index in parameters):
            create(client, name, parameters, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "create_index", without_scalars)
        assert_refused(lite, file, "all", "index 'path' is missing in one made like it")
    monkeypatch.setattr(MilvusClient, "create_partition", lambda *_, **__: None)
    assert_refused(lite, file, "parted", "partition 'summer'")


def test_one_that_is_there_already_and_differs_is_left_alone(lite: MilvusClient, file: str) -> None:
    make(lite, "one", ("path", DataType.VARCHAR, {"max_length": 50}))
    make(lite, "one_copy", ("path", DataType.VARCHAR, {"max_length": 60}))
    with opened(file, "one") as store:
        with pytest.raises(StoreRejected, match="field 'path' max_length is '50' in the collection and '60'"):
            store.create_like("one_copy", dim=DIM)
        with pytest.raises(StoreRejected, match=f"with {DIM}-d vectors instead of {2 * DIM}-d ones: remove it"):
            store.create_like("one_copy", dim=2 * DIM)
    assert sorted(lite.list_collections()) == ["one", "one_copy"]


def test_other_aliases_are_named(lite: MilvusClient, file: str) -> None:
    make(lite, "one")
    for alias in ("shop", "admin"):
        lite.create_alias("one", alias)
    with opened(file, "shop", write=False) as store:
        assert any(note.startswith("admin: alias of this collection") for note in store.capabilities.notes)
        assert not any(note.startswith("shop") for note in store.capabilities.notes)


# -- functions and further vectors ----------------------------------------------------------------------------------


BM25 = Function(
    name="words", function_type=FunctionType.BM25, input_field_names=["text"], output_field_names=["sparse"]
)
TEXT = ("text", DataType.VARCHAR, {"max_length": 1000, "enable_analyzer": True})
SPARSE: tuple[str, DataType, dict[str, Any]] = ("sparse", DataType.SPARSE_FLOAT_VECTOR, {})
TEXTS = ["a red cat", "a dog", "two red dogs", "a hat"]


def test_a_function_works_on_in_place_and_in_a_copy(lite: MilvusClient, file: str) -> None:
    by_words = {"field_name": "sparse", "index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25"}
    make(lite, "words", TEXT, SPARSE, functions=(BM25,), indexes=(by_words,))
    vectors = unit_vectors(4)
    lite.insert("words", [{"id": key, "embedding": vectors[key], "text": TEXTS[key]} for key in range(4)])

    def found(name: str) -> list[int]:
        return [hit["id"] for hit in lite.search(name, data=["red dogs"], anns_field="sparse", limit=1)[0]]

    def generated(name: str) -> dict[int, Any]:
        return {row["id"]: row["sparse"] for row in lite.query(name, filter="id >= 0", output_fields=["sparse"])}

    assert found("words") == [2]
    before = generated("words")
    assert_carried(lite, file, "words")
    with opened(file, "words") as store:
        page = store.scan(after=None, limit=10)
        assert list(page.payloads) == [{"text": text} for text in TEXTS], "what is generated is no payload"
        assert any("sparse: filled by functions" in note for note in store.capabilities.notes)
        report = store.write_vectors(page.ids, unit_vectors(4, seed=1), None, expected=page)
        assert list(report.written) == [0, 1, 2, 3]
        with closing(store.open_collection("words_copy")) as copy:
            wide = Page(page.ids, np.ones((4, 2 * DIM), np.float32), page.payloads, page.stamps)
            assert list(copy.insert(wide).written) == [0, 1, 2, 3]
    for name in ("words", "words_copy"):
        assert (found(name), generated(name)) == ([2], before)


def test_vectors_that_a_function_makes_are_not_migrated(lite: MilvusClient, file: str) -> None:
    make(lite, "words", TEXT, SPARSE, functions=(BM25,))
    with pytest.raises(StoreRejected, match="sparse is a SPARSE_FLOAT_VECTOR: only FLOAT_VECTOR"):
        open_store({"kind": "milvus", "uri": file, "collection": "words", "vector": "sparse"}, write=False)


def test_an_embedding_that_a_function_makes_is_refused(
    lite: MilvusClient, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(lite, "texts", ("text", DataType.VARCHAR, {"max_length": 100}))
    describe = MilvusClient.describe_collection
    function = {"name": "embedder", "input_field_names": ["text"], "output_field_names": ["embedding"]}

    def with_function(client: MilvusClient, name: str, **options: Any) -> Any:
        return {**describe(client, name, **options), "functions": [function]}

    monkeypatch.setattr(MilvusClient, "describe_collection", with_function)
    with pytest.raises(StoreRejected, match="embedding is filled by the function embedder of the collection"):
        open_store({"kind": "milvus", "uri": file, "collection": "texts"}, write=False)


def test_further_vectors_stay_as_they_are(lite: MilvusClient, file: str) -> None:
    make(
        lite,
        "many",
        ("thumb", DataType.FLOAT_VECTOR, {"dim": 3}),
        SPARSE,
        indexes=(
            {"field_name": "thumb", "index_type": "FLAT", "metric_type": "L2"},
            {"field_name": "sparse", "index_type": "SPARSE_INVERTED_INDEX", "metric_type": "IP"},
        ),
    )
    vectors = unit_vectors(4)
    lite.insert(
        "many",
        [
            {"id": key, "embedding": vectors[key], "thumb": [0.1 * key, 1, 0], "sparse": {7 + key: 0.1, 2**31: 2.5}}
            for key in range(4)
        ],
    )

    def others(name: str) -> list[dict[str, Any]]:
        rows = lite.query(name, filter="id >= 0", output_fields=["thumb", "sparse"])
        return sorted(rows, key=lambda row: row["id"])

    before = others("many")
    assert len(before) == 4
    assert_carried(lite, file, "many")
    with opened(file, "many") as store:
        page = store.scan(after=None, limit=10)
        with closing(store.open_collection("many_copy")) as copy:
            wide = Page(page.ids, np.ones((4, 2 * DIM), np.float32), page.payloads, page.stamps)
            assert list(copy.insert(wide).written) == [0, 1, 2, 3]
        assert list(store.write_vectors(page.ids, unit_vectors(4, seed=1), None, expected=page).written) == [
            0,
            1,
            2,
            3,
        ]
    assert others("many") == others("many_copy") == before


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (DataType.BINARY_VECTOR, bytes([0b10110010, 7])),
        (DataType.FLOAT16_VECTOR, np.arange(16, dtype=np.float16) / 3),
        (DataType.BFLOAT16_VECTOR, bytes(range(32))),
        (DataType.INT8_VECTOR, np.arange(-8, 8, dtype=np.int8)),
    ],
    ids=["binary", "float16", "bfloat16", "int8"],
)
def test_vectors_of_bytes_go_back_as_the_client_gives_them(kind: DataType, value: Any) -> None:
    """No server here has them beside a float vector: pymilvus packs, unpacks, and packs again what we make of it."""
    from pymilvus.client.prepare import Prepare
    from pymilvus.client.types import HybridExtraList

    field = {"name": "other", "type": kind, "params": {"dim": 16}}
    key = {"name": "id", "type": DataType.INT64, "params": {}, "is_primary": True}

    def packed(value: Any) -> Any:
        request = Prepare.row_insert_param("c", [{"id": 1, "other": value}], "", fields_info=[key, field])
        return next(data for data in request.fields_data if data.field_name == "other")

    first = packed(value)
    (row,) = HybridExtraList([first], [{"other": None}], strict_float32=True)
    assert packed(plain_value(row["other"], field)) == first


# -- what no server here has ----------------------------------------------------------------------------------------


def test_what_newer_servers_have_is_asked_for_again() -> None:
    """pymilvus describes a collection, and what is asked for in its turn is the same message, but for the dimension."""
    from pymilvus.client.abstract import CollectionSchema as Described
    from pymilvus.client.prepare import Prepare
    from pymilvus.grpc_gen import milvus_pb2

    schema = MilvusClient.create_schema(enable_dynamic_field=True, description="pictures")
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=50, description="the key")
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=8, mmap_enabled=True)
    schema.add_field("price", DataType.DOUBLE, is_clustering_key=True, nullable=True, default_value=0.0)
    schema.add_field("bits", DataType.BINARY_VECTOR, dim=16, nullable=True)
    schema.add_field("half", DataType.FLOAT16_VECTOR, dim=4)
    schema.add_field(
        "text",
        DataType.VARCHAR,
        max_length=100,
        enable_analyzer=True,
        enable_match=True,
        analyzer_params={"type": "english", "stop_words": ["of"]},
        mmap_enabled=False,
    )
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_field("made", DataType.FLOAT_VECTOR, dim=4)
    schema.add_function(
        Function("words", FunctionType.BM25, ["text"], ["sparse"], description="full text", params={"k": "1"})
    )
    schema.add_function(
        Function("model", FunctionType.TEXTEMBEDDING, ["text"], ["made"], params={"provider": "p", "model_name": "m"})
    )
    part = MilvusClient.create_struct_field_schema()
    part.add_field("label", DataType.VARCHAR, max_length=20)
    part.add_field("box", DataType.FLOAT_VECTOR, dim=4)
    schema.add_field(
        "parts", DataType.ARRAY, element_type=DataType.STRUCT, struct_schema=part, max_capacity=9, nullable=True
    )
    message = Prepare.get_schema_from_collection_schema("c", schema)
    answer = milvus_pb2.DescribeCollectionResponse(schema=message, collection_name="c", shards_num=3)
    answer.properties.add(key="collection.ttl.seconds", value="60")
    source = Description(Described(answer).dict(), [], ["_default"])

    asked: dict[str, Any] = {}
    want = wanted(source, vector="embedding", dim=24)
    create(lambda method, name, **options: asked.update(options, method=method, name=name), "d", want)
    assert (asked["method"], asked["num_shards"]) == ("create_collection", 3)
    assert asked["properties"] == {"collection.ttl.seconds": "60"}
    sent = Prepare.get_schema_from_collection_schema("c", asked["schema"])
    for parameter in message.fields[1].type_params:
        if parameter.key == "dim":
            parameter.value = "24"
    assert sent == message
    answer.schema.CopyFrom(sent)
    assert difference(want, Description(Described(answer).dict(), [], ["_default"])) is None
    answer.schema.struct_array_fields[0].fields[0].type_params[0].value = "10"
    answer.schema.functions[0].params[0].value = "2"
    found = difference(want, Description(Described(answer).dict(), [], ["_default"]))
    assert found == "field 'parts': field 'label' max_length is '20' in the collection and '10' in one made like it"
    answer.schema.CopyFrom(sent)
    answer.schema.functions[0].params[0].value = "2"
    found = difference(want, Description(Described(answer).dict(), [], ["_default"]))
    assert found == "function 'words' k is '1' in the collection and '2' in one made like it"


# -- a real server ------------------------------------------------------------------------------------------------


@ON_THE_SERVER
def test_what_a_server_tells_is_carried(
    server: MilvusServer, server_client: MilvusClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_with_everything(server_client, "all", scalar_index="Trie")
    found = server_client.describe_collection("all")
    assert (found["num_shards"], found["num_partitions"], found["description"]) == (
        2,
        7,
        "pictures of products",
    )
    assert_carried(server_client, server.uri, "all")
    server_client.drop_collection("all_copy")
    monkeypatch.setattr(MilvusClient, "create_collection", client_that(lambda options: options.pop("num_shards")))
    assert_refused(server_client, server.uri, "all", "num_shards is '2' in the collection and '1'")


@ON_THE_SERVER
def test_on_a_server_a_partition_that_is_not_loaded_is_named(server: MilvusServer, server_client: MilvusClient) -> None:
    """The collection counts as loaded, and shows the rows of the other partitions alone."""
    make(server_client, "parted")
    server_client.create_partition("parted", "summer")
    with opened(server.uri, "parted", write=False):
        pass
    server_client.release_partitions("parted", ["_default"])
    server_client.load_partitions("parted", ["summer"])
    assert server_client.get_load_state("parted")["state"] == LoadState.Loaded
    with pytest.raises(StoreRejected, match="partition _default of collection parted is not loaded"):
        opened(server.uri, "parted", write=False)
    server_client.load_collection("parted")
    with opened(server.uri, "parted", write=False) as store:
        store.check_create_like(dim=DIM)
    assert server_client.list_collections() == ["parted"]


@ON_THE_SERVER
def test_on_a_server_a_copy_that_cannot_be_loaded_is_removed(
    server: MilvusServer, server_client: MilvusClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many replicas as the collection has are asked for; here there is room for one."""
    make(server_client, "one")
    describe = MilvusClient.describe_replica
    monkeypatch.setattr(MilvusClient, "describe_replica", lambda *words, **more: describe(*words, **more) * 2)
    with opened(server.uri, "one") as store, pytest.raises(StoreRejected, match="like one, with 2 replicas: "):
        store.create_like("one_copy", dim=DIM)
    assert server_client.list_collections() == ["one"]
