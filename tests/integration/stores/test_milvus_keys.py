"""Collections as tutorials make them: keys that Milvus makes (auto_id), a key called `path`, vectors of any length.

What a server does with given keys is tried out by the adapter; here it is checked with pymilvus alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient, MilvusException

from migrator.adapters.base import Page, Store, StoreRejected
from migrator.adapters.milvus.connection import Connection
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, unit_vectors
from tests.integration.stores.test_milvus import drop_new
from tests.milvus_server import ON_THE_SERVER, MilvusServer

DOCS = Path(__file__).parents[3] / "docs" / "reference" / "stores" / "milvus.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("keys") / "milvus.db")


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


def opened(uri: str, name: str = "images", *, write: bool = True, **more: Any) -> Any:
    return closing(open_store({"kind": "milvus", "uri": uri, "collection": name, **more}, write=write))


def make(client: MilvusClient, name: str = "images", *, rows: int = 6, **more: Any) -> tuple[list[int], np.ndarray]:
    """As the image search of Milvus' bootcamp has it; returns the keys that Milvus made, and the vectors."""
    schema = client.create_schema(auto_id=True, enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("path", DataType.VARCHAR, max_length=500)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="IVF_FLAT", metric_type="COSINE", params={"nlist": 4})
    client.create_collection(name, schema=schema, **more)
    client.create_index(name, index, sync=False)
    client.load_collection(name)
    vectors = unit_vectors(rows) * np.linspace(1, 9, rows, dtype=np.float32)[:, None]
    made = client.insert(
        name,
        [{"path": f"{row}.png", "embedding": vectors[row], "metadata": {"source": f"{row}"}} for row in range(rows)],
    )
    return list(made["ids"]), vectors


def lies(client: MilvusClient, name: str) -> dict[Any, Any]:
    """Key -> path and vector, as the application reads it."""
    rows = client.query(
        name, filter='path >= ""', output_fields=["*"], consistency_level="Strong", strict_float32=True, limit=1000
    )
    return {row["id"]: (row["path"], np.array(row["embedding"], np.float32).tobytes()) for row in rows}


def new_page(store: Store, dim: int) -> Page:
    page = store.scan(after=None, limit=100)
    return Page(page.ids, unit_vectors(len(page), seed=3)[:, :dim], page.payloads, page.stamps)


# -- Milvus Lite ----------------------------------------------------------------------------------------------------


def test_lite_writes_in_place_under_the_keys_that_it_made(lite: MilvusClient, file: str) -> None:
    keys, vectors = make(lite)
    before = lies(lite, "images")
    with opened(file) as store:
        assert store.capabilities.in_place_refusal is None
        page = store.scan(after=None, limit=100)
        assert (list(page.ids), page.payloads[2]) == (keys, {"path": "2.png", "metadata": {"source": "2"}})
        np.testing.assert_array_equal(page.vectors, vectors)
        new = unit_vectors(6, seed=1)
        assert list(store.write_vectors(page.ids, new, "new", expected=page).written) == keys
        assert lies(lite, "images") == {key: (f"{row}.png", new[row].tobytes()) for row, key in enumerate(keys)}
        assert list(store.write_vectors(keys, vectors, None).written) == keys
    assert lies(lite, "images") == before
    assert lite.list_collections() == ["images"], "what was tried is gone"


def test_in_lite_a_copy_would_make_keys_that_are_taken(lite: MilvusClient, file: str) -> None:
    """Why a copy with auto_id is refused there: its next key is one of those that were copied."""
    schema = lite.create_schema(auto_id=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=2)
    lite.create_collection("plain", schema=schema)
    lite.insert("plain", [{"id": 3, "embedding": [1, 0]}, {"id": 2, "embedding": [1, 0]}])
    assert list(lite.insert("plain", [{"embedding": [0, 1]}])["ids"]) == [3]

    make(lite)
    for write, call in (
        (False, lambda store: store.check_create_like(dim=DIM)),
        (True, lambda store: store.create_like("images_b", dim=DIM)),
    ):
        with opened(file, write=write) as store, pytest.raises(StoreRejected) as refusal:
            call(store)
        said = str(refusal.value)
        assert "in a copy this server would make keys that are there already" in said
        assert "set rollout.strategy to in_place, or set store.auto_id_in_shadow to keep_keys" in said
    with opened(file) as store, pytest.raises(StoreRejected, match=r"already: set store\.auto_id_in_shadow"):
        store.create_like("images_b", dim=2 * DIM)
    assert sorted(lite.list_collections()) == ["images", "plain"]


def keeps_keys(client: MilvusClient, uri: str) -> None:
    """The way out that the refusals name: a shadow with the keys, which makes none."""
    keys, _ = make(client)
    before = lies(client, "images")
    with opened(uri, auto_id_in_shadow="keep_keys", write=False) as store:
        store.check_create_like(dim=4)
        assert any("auto_id_in_shadow is keep_keys" in note for note in store.capabilities.notes)
    assert client.list_collections() == ["images"]
    with opened(uri, auto_id_in_shadow="keep_keys") as store, closing(store.create_like("images_b", dim=4)) as copy:
        assert copy.capabilities.in_place_refusal is None
        page = new_page(store, 4)
        for _ in range(2):
            assert sorted(copy.insert(page).written) == sorted(keys)
        assert lies(client, "images_b") == {
            key: (f"{row}.png", page.vectors[row].tobytes()) for row, key in enumerate(keys)
        }
        # What an application adds there has a key of its own.
        client.insert("images_b", [{"id": 7, "path": "7.png", "embedding": [1, 0, 0, 0]}])
        assert copy.count() == 7
    described = client.describe_collection("images_b")
    assert [field.get("auto_id", False) for field in described["fields"]] == [False, False, False]
    assert lies(client, "images") == before


def test_lite_keeps_keys_in_a_shadow(lite: MilvusClient, file: str) -> None:
    keeps_keys(lite, file)


def recipe() -> Callable[[MilvusClient, str, str], None]:
    """The function of the documentation."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "keys" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    return names["copy_with_keys"]


def copied_by_the_recipe(client: MilvusClient, uri: str) -> None:
    keys, _ = make(client)
    recipe()(client, "images", "copy")
    assert lies(client, "copy") == lies(client, "images")
    with opened(uri, "copy") as store:
        page = store.scan(after=None, limit=100)
        assert list(page.ids) == keys
        assert list(store.write_vectors(keys, unit_vectors(6, seed=1), "new", expected=page).written) == keys
        store.check_create_like(dim=4)
        assert store.describe().index == "IVF_FLAT nlist=4" if "://" in uri else "IVF_FLAT"


def test_the_recipe_of_the_documentation(lite: MilvusClient, file: str) -> None:
    copied_by_the_recipe(lite, file)


def test_a_setting_that_is_none(file: str, lite: MilvusClient) -> None:
    with pytest.raises(StoreRejected, match="`auto_id_in_shadow` of a milvus store is 'keep_keys' or not there"):
        opened(file, auto_id_in_shadow="on")


@pytest.mark.parametrize("more", [{}, {"auto_id": True}, {"id_type": "string", "max_length": 40}], ids=str)
def test_what_the_client_makes_in_one_call(lite: MilvusClient, file: str, more: dict[str, Any]) -> None:
    """`create_collection(name, dimension=...)`, pymilvus' quick set-up, and what LangChain lays into it."""
    lite.create_collection("quick", dimension=DIM, **more)
    vectors = unit_vectors(3) * 5
    keys: list[Any] = [f"k{row}" for row in range(3)] if "id_type" in more else list(range(3))
    rows = [{"vector": vectors[row], "text": "t", "metadata": {"source": f"{row}.png"}} for row in range(3)]
    if not more.get("auto_id"):
        rows = [{"id": key, **row} for key, row in zip(keys, rows, strict=True)]
    keys = list(lite.insert("quick", rows)["ids"])
    with opened(file, "quick", auto_id_in_shadow="keep_keys") as store:
        page = store.scan(after=None, limit=10)
        assert (list(page.ids), [payload["metadata"]["source"] for payload in page.payloads]) == (
            keys,
            ["0.png", "1.png", "2.png"],
        )
        store.check_create_like(dim=4)
        report = store.write_vectors(keys, unit_vectors(3, seed=1), "new", expected=page)
        assert list(report.written) == keys
        with closing(store.create_like("quick_b", dim=4)) as copy:
            assert list(copy.insert(new_page(store, 4)).written) == keys
    assert lite.describe_index("quick_b", "vector")["index_type"] == "AUTOINDEX"


# -- servers that are not here ----------------------------------------------------------------------------------------


class Newer:
    """What the documentation says of Milvus 2.6, in front of Milvus Lite: an upsert gives the row a key made by the
    server, an insert takes given keys where a property of the collection says so, and made keys are large."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, allowed: bool = True, upsert_keeps: bool = False) -> None:
        self.made = 450_000_000_000_000_000
        self.allowed, self.upsert_keeps = allowed, upsert_keeps
        self.describe, self.insert_, self.upsert_ = (
            MilvusClient.describe_collection,
            MilvusClient.insert,
            MilvusClient.upsert,
        )
        monkeypatch.setattr(MilvusClient, "get_server_version", lambda *_, **__: "v2.6.0")
        monkeypatch.setattr(MilvusClient, "insert", lambda client, *words, **more: self.insert(client, *words, **more))
        monkeypatch.setattr(MilvusClient, "upsert", lambda client, *words, **more: self.upsert(client, *words, **more))

    def auto(self, client: MilvusClient, name: str) -> tuple[bool, bool]:
        found = self.describe(client, name)
        return bool(found["auto_id"]), self.allowed and found["properties"].get("allow_insert_auto_id") == "true"

    def insert(self, client: MilvusClient, name: str, rows: list[dict[str, Any]], **more: Any) -> Any:
        auto, allowed = self.auto(client, name)
        if auto:
            if "id" in rows[0] and not allowed:
                raise MilvusException(1100, "autoID field does not accept values")
            if "id" in rows[0]:
                there = {row["id"] for row in client.query(name, filter="id >= 0", output_fields=["id"])}
                assert there.isdisjoint(row["id"] for row in rows), "would lie there twice"
            else:
                rows = [{**row, "id": self.made + number} for number, row in enumerate(rows)]
                self.made += len(rows)
        return self.insert_(client, name, rows, **more)

    def upsert(self, client: MilvusClient, name: str, rows: list[dict[str, Any]], **more: Any) -> Any:
        if self.auto(client, name)[0] and not self.upsert_keeps:
            client.delete(name, ids=[row["id"] for row in rows])
            rows = [{**row, "id": self.made + number} for number, row in enumerate(rows)]
            self.made += len(rows)
        return self.upsert_(client, name, rows, **more)


def test_a_server_whose_upsert_makes_a_new_key(lite: MilvusClient, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would delete the row and add another one: nothing is written in place. Rows are copied with their keys."""
    Newer(monkeypatch)
    keys, _ = make(lite)
    before = lies(lite, "images")
    with opened(file) as store:
        refusal = store.capabilities.in_place_refusal
        assert refusal is not None
        assert refusal.endswith("set rollout.strategy to shadow")
        with pytest.raises(StoreRejected, match="writes no row under a given key"):
            store.write_vectors(keys, unit_vectors(6), "new")
        assert lies(lite, "images") == before
        store.check_create_like(dim=4)
        assert lite.list_collections() == ["images"]
        with closing(store.create_like("images_b", dim=4)) as copy:
            assert lite.describe_collection("images_b")["properties"]["allow_insert_auto_id"] == "true"
            page = new_page(store, 4)
            for _ in range(2):
                assert sorted(copy.insert(page).written) == sorted(keys)
            assert sorted(lies(lite, "images_b")) == sorted(keys)
        # Back into the old one, which does not say that it takes keys: named, not lost.
        report = store.insert(store.scan(after=None, limit=100))
        assert (list(report.written), sorted(report.rejected)) == ([], sorted(keys))
    assert lies(lite, "images") == before


def test_a_server_whose_upsert_keeps_the_key(lite: MilvusClient, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Newer(monkeypatch, upsert_keeps=True)
    keys, _ = make(lite)
    with opened(file) as store:
        assert store.capabilities.in_place_refusal is None
        page = store.scan(after=None, limit=100)
        assert sorted(store.write_vectors(page.ids, unit_vectors(6, seed=1), "new", expected=page).written) == keys
        with closing(store.create_like("images_b", dim=4)) as copy:
            assert sorted(copy.insert(new_page(store, 4)).written) == keys
    assert lite.describe_collection("images_b")["auto_id"]
    assert sorted(lies(lite, "images_b")) == keys


def test_a_server_that_takes_no_key(lite: MilvusClient, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Newer(monkeypatch, allowed=False)
    make(lite)
    with opened(file, write=False) as store, pytest.raises(StoreRejected, match="takes no rows with given keys: set"):
        store.check_create_like(dim=DIM)
    assert lite.list_collections() == ["images"]


# -- the key by its own name, and values ------------------------------------------------------------------------------


def test_the_key_is_payload_under_its_own_name(lite: MilvusClient, file: str) -> None:
    schema = lite.create_schema(enable_dynamic_field=True)
    schema.add_field("path", DataType.VARCHAR, is_primary=True, max_length=200)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    index = lite.prepare_index_params()
    index.add_index("embedding", index_type="AUTOINDEX", metric_type="COSINE")
    lite.create_collection("images", schema=schema)
    lite.create_index("images", index, sync=False)
    names = ["a/1.png", "b/ä \"2'.png", "c.png"]
    vectors = unit_vectors(3)
    lite.insert("images", [{"path": name, "embedding": vectors[row], "n": row} for row, name in enumerate(names)])
    with opened(file) as store:
        assert store.describe().schema["path"] == "VARCHAR"
        page = store.scan(after=None, limit=10)
        assert list(page.payloads) == [{"path": name, "n": row} for row, name in enumerate(names)]
        report = store.write_vectors(page.ids, unit_vectors(3, seed=1), "new", expected=page)
        assert list(report.written) == names
        with closing(store.create_like("images_b", dim=DIM)) as copy:
            assert list(copy.insert(page).written) == names
            assert list(copy.scan(after=None, limit=10).payloads) == list(page.payloads)
    rows = lite.query("images_b", filter='path >= ""', output_fields=["*"])
    assert {row["path"]: row["n"] for row in rows} == {name: row for row, name in enumerate(names)}


Fields = dict[str, tuple[DataType, dict[str, Any], list[Any]]]
"""For each field its type, its options, and values."""


def made_with(client: MilvusClient, name: str, fields: Fields) -> None:
    """A collection with these fields, and a row for each of their values."""
    schema = client.create_schema(enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
    for field, (kind, options, _) in fields.items():
        schema.add_field(field, kind, **options)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema)
    client.create_index(name, index, sync=False)
    client.load_collection(name)
    count = max(len(values) for _, _, values in fields.values())
    rows = [
        {
            "id": row,
            "embedding": unit_vectors(count)[row],
            **{field: values[row % len(values)] for field, (_, _, values) in fields.items()},
            "metadata": {"source": f"{row}.png", "tags": ["a", None], "deep": {"x": [1.5, {"y": True}]}},
        }
        for row in range(count)
    ]
    client.insert(name, rows)


NUMBERS: Fields = {
    "i8": (DataType.INT8, {}, [-128, 0, 127]),
    "i16": (DataType.INT16, {}, [-(2**15), 0, 2**15 - 1]),
    "i32": (DataType.INT32, {}, [-(2**31), 0, 2**31 - 1]),
    "i64": (DataType.INT64, {}, [-(2**63), 0, 2**63 - 1]),
    "f": (DataType.FLOAT, {}, [0.1, -0.0, 3.4028234663852886e38]),
    "d": (DataType.DOUBLE, {}, [0.1, 5e-324, 1.7976931348623157e308]),
    "b": (DataType.BOOL, {}, [True, False, True]),
    "short": (DataType.VARCHAR, {"max_length": 4}, ["", "ab", "ä𝄞"[:1]]),
    "long": (DataType.VARCHAR, {"max_length": 65_535}, ["x" * 65_535, "\x00\n\"'\\", "é"]),
    "json": (DataType.JSON, {}, [{"a": [1, {"b": None}], "": 2**53 + 1}, {}, {"x": {"y": {"z": [[]]}}}]),
    "ints": (DataType.ARRAY, {"element_type": DataType.INT8, "max_capacity": 3}, [[], [-128, 127], [0, 1, 2]]),
    "texts": (
        DataType.ARRAY,
        {"element_type": DataType.VARCHAR, "max_capacity": 3, "max_length": 9},
        [["", "ä"], [], ["x"]],
    ),
    "floats": (DataType.ARRAY, {"element_type": DataType.FLOAT, "max_capacity": 3}, [[0.1], [], [1e30, -0.0]]),
    "bools": (DataType.ARRAY, {"element_type": DataType.BOOL, "max_capacity": 3}, [[True], [], [False, True]]),
}  # fmt: skip


def whole(client: MilvusClient, name: str) -> dict[int, str]:
    """Everything but vector and stamp, as pymilvus reads it; NaN is `nan` here."""
    rows = client.query(name, filter="id >= 0", output_fields=["*"], consistency_level="Strong", limit=100)
    return {
        row["id"]: repr(sorted((key, value) for key, value in row.items() if key not in ("embedding", "_migrator")))
        for row in rows
    }


def assert_values_survive(client: MilvusClient, uri: str, name: str) -> None:
    before = whole(client, name)
    with opened(uri, name) as store:
        page = store.scan(after=None, limit=100)
        store.scan(after=None, limit=100)  # what is remembered in Milvus Lite is then not the very same objects
        report = store.write_vectors(page.ids, unit_vectors(len(page), seed=1), "new", expected=page)
        assert (list(report.written), list(report.changed)) == (list(page.ids), [])
        assert whole(client, name) == before
        with closing(store.create_like(f"{name}_copy", dim=2 * DIM)) as copy:
            wide = Page(page.ids, np.ones((len(page), 2 * DIM), np.float32), page.payloads, page.stamps)
            assert list(copy.insert(wide).written) == list(page.ids)
    assert whole(client, f"{name}_copy") == before


def nested_payloads_are_mappings(uri: str, name: str) -> None:
    with opened(uri, name, write=False) as store:
        page = store.scan(after=None, limit=100)
    payload = page.payloads[0]
    assert payload["metadata"] == {"source": "0.png", "tags": ["a", None], "deep": {"x": [1.5, {"y": True}]}}
    assert type(payload["metadata"]) is dict
    assert type(payload["json"]) is dict


def test_values_at_their_limits_survive(lite: MilvusClient, file: str) -> None:
    made_with(lite, "values", NUMBERS)
    nested_payloads_are_mappings(file, "values")
    assert_values_survive(lite, file, "values")


ODD: Fields = {
    "f": (DataType.FLOAT, {}, [float("nan"), float("inf"), 1.0]),
    "d": (DataType.DOUBLE, {}, [float("nan"), float("-inf"), 1.0]),
    "json": (DataType.JSON, {}, [{}]),
}


def test_numbers_that_are_none_are_no_change(lite: MilvusClient, file: str) -> None:
    """NaN is not equal to itself: a row with one was taken for changed, again and again."""
    made_with(lite, "values", ODD)
    assert "nan" in whole(lite, "values")[0]
    assert_values_survive(lite, file, "values")


def test_null_places_and_times_survive(lite: MilvusClient, file: str) -> None:
    made_with(
        lite,
        "values",
        {
            "maybe": (DataType.INT64, {"nullable": True}, [None, 0, 1]),
            "word": (DataType.VARCHAR, {"nullable": True, "max_length": 9}, [None, "", "x"]),
            "list": (
                DataType.ARRAY,
                {"nullable": True, "element_type": DataType.INT64, "max_capacity": 3},
                [None, [], [1]],
            ),
            "json": (DataType.JSON, {"nullable": True}, [None, {}, {"a": None}]),
            "place": (DataType.GEOMETRY, {"nullable": True}, ["POINT (1.5 2)", None, "POLYGON ((0 0, 1 0, 1 1, 0 0))"]),
            "time": (
                DataType.TIMESTAMPTZ,
                {"nullable": True},
                ["2025-05-01T23:59:59.123456+08:00", None, "1969-12-31T00:00:00Z"],
            ),
        },
    )
    assert_values_survive(lite, file, "values")


def test_a_row_without_a_vector_reads_as_zeros(lite: MilvusClient, file: str) -> None:
    schema = lite.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM, nullable=True)
    index = lite.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    lite.create_collection("images", schema=schema)
    lite.create_index("images", index, sync=False)
    lite.insert("images", [{"id": 1, "embedding": unit_vectors(1)[0]}, {"id": 2, "embedding": None}])
    with opened(file) as store:
        vectors = store.scan(after=None, limit=10).vectors
        assert (vectors[0].any(), vectors[1].any()) == (True, False)


def vectors_of_any_length(client: MilvusClient, uri: str) -> None:
    """COSINE: read and written as they are, scores by direction alone."""
    keys, vectors = make(client, "odd", rows=6)
    with opened(uri, "odd", write=False) as store:
        np.testing.assert_array_equal(store.read_vectors(keys).vectors, vectors)
        for exact in (False, True):
            hits = store.search(vectors[:2] * 7, 1, exact=exact)
            assert [ids[0] for ids in hits.ids] == keys[:2]
            np.testing.assert_allclose([scores[0] for scores in hits.scores], 1, atol=1e-5)


def test_lite_compares_directions(lite: MilvusClient, file: str) -> None:
    vectors_of_any_length(lite, file)


# -- a real server ----------------------------------------------------------------------------------------------------


@ON_THE_SERVER
def test_a_server_that_writes_no_given_keys(server: MilvusServer, server_client: MilvusClient) -> None:
    keys, _ = make(server_client)
    before = lies(server_client, "images")
    with opened(server.uri) as store:
        refusal = store.capabilities.in_place_refusal
        assert refusal is not None
        assert "this server writes no row under a given key: set rollout.strategy to shadow" in refusal
        with pytest.raises(StoreRejected, match="writes no row under a given key"):
            store.write_vectors(keys, unit_vectors(6), "new")
        for call in (lambda: store.check_create_like(dim=DIM), lambda: store.create_like("images_b", dim=DIM)):
            with pytest.raises(StoreRejected, match=r"given keys: set store\.auto_id_in_shadow to keep_keys"):
                call()
        report = store.insert(store.scan(after=None, limit=100))
        assert (list(report.written), sorted(report.rejected)) == ([], sorted(keys))
    assert server_client.list_collections() == ["images"]
    assert lies(server_client, "images") == before
    drop_new(server_client, set())
    keeps_keys(server_client, server.uri)
    drop_new(server_client, set())
    copied_by_the_recipe(server_client, server.uri)


@ON_THE_SERVER
def test_on_a_server_values_and_lengths_survive(server: MilvusServer, server_client: MilvusClient) -> None:
    made_with(server_client, "values", NUMBERS)
    nested_payloads_are_mappings(server.uri, "values")
    assert_values_survive(server_client, server.uri, "values")
    vectors_of_any_length(server_client, server.uri)
