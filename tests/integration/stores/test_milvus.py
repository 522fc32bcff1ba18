"""The Milvus adapter under the contract of all stores: Milvus Lite, and a real server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient

from migrator.adapters.base import ItemId, Page, Store, Vectors
from migrator.adapters.milvus.connection import Connection
from migrator.adapters.milvus.lite import Known
from migrator.adapters.milvus.reader import STAMP
from migrator.adapters.registry import open_store
from migrator.adapters.testing import DIM, Collection, Make, StoreContract, payloads_of, unit_vectors
from tests.milvus_server import ON_THE_SERVER, MilvusServer


@dataclass
class Rows(Collection):
    """A collection that the application reaches with a client of its own."""

    client: MilvusClient
    uri: str
    name: str
    dynamic: bool
    aliases: list[str] = field(default_factory=list)

    def open(self, *, write: bool = True) -> Store:
        name = self.aliases[0] if self.aliases else self.name
        return open_store({"kind": "milvus", "uri": self.uri, "collection": name}, write=write)

    def add_alias(self) -> str:
        self.aliases.append(f"{self.name}_alias")
        self.client.create_alias(self.name, self.aliases[0])
        return self.aliases[0]

    def alias_leads_to(self) -> str:
        return str(self.client.describe_collection(self.aliases[0])["collection_name"])

    def all_names(self) -> set[str]:
        return set(self.client.list_collections())

    def create(self, *, strings: bool, metric: str, index: str) -> None:
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=self.dynamic)
        if strings:
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=200)
        else:
            schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
        schema.add_field("path", DataType.VARCHAR, max_length=400)
        schema.add_field("price", DataType.DOUBLE)
        parameters = self.client.prepare_index_params()
        settings = {"HNSW": {"M": 8, "efConstruction": 64}, "IVF_FLAT": {"nlist": 8}}.get(index, {})
        parameters.add_index("embedding", index_type=index, metric_type=metric, params=settings)
        self.client.create_collection(self.name, schema=schema)
        self.client.create_index(self.name, parameters, sync=False)  # else the client sleeps half a second
        self.client.load_collection(self.name)

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None:
        rows = [
            {"id": item, "embedding": vector, **payload}
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        if rows:
            self.client.upsert(self.name, rows)

    def rows(self) -> list[dict[str, Any]]:
        self.client.query(self.name, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return list(
            self.client.query(
                self.name,
                filter="",
                limit=10_000,
                output_fields=["*"],
                consistency_level="Strong",
                strict_float32=True,
                iterator="True",
            )
        )

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        found = {row["id"]: row for row in self.rows()}
        payloads = [
            {name: value for name, value in found[item].items() if name not in ("id", "embedding", STAMP)}
            for item in ids
        ]
        self.insert(ids, vectors, payloads)

    def delete(self, ids: Sequence[ItemId]) -> None:
        keys = ", ".join(json.dumps(item, ensure_ascii=False) for item in ids)
        self.client.delete(self.name, filter=f"id in [{keys}]")

    def visible(self) -> dict[ItemId, np.ndarray]:
        return {row["id"]: np.array(row["embedding"], np.float32) for row in self.rows()}


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5) | st.sampled_from(
    ["7", "07", " ", "a b", "it's", '"', "\\", '\\"', "é", "e\u0301", "𝄞", "\n", "%", "{x}"]
)


def words() -> list[ItemId]:
    return [f"{word} {number}" for number in range(50) for word in ("cat", "it's", "Ärger", '"𝄞"')]


def maker(client: MilvusClient, uri: str, *, strings: bool, metric: str, index: str, dynamic: bool) -> Make:
    def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Rows:
        rows = Rows(client, uri, f"test_{uuid.uuid4().hex[:12]}", dynamic)
        rows.create(strings=strings, metric=metric, index=index)
        rows.insert(ids, vectors, payloads)
        return rows

    return make


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("lite") / "milvus.db")


@pytest.fixture(scope="module")
def lite_client(lite: str) -> Iterator[MilvusClient]:
    client = MilvusClient(lite)
    # The last connection of the adapter ends the Milvus Lite of this process: one is kept for the application's client.
    kept = Connection({"uri": lite})
    yield client
    client.close()
    kept.release()


class InLite(StoreContract):
    strings = False
    metric, index, dynamic = "COSINE", "HNSW", True

    @pytest.fixture
    def make(self, lite: str, lite_client: MilvusClient) -> Iterator[Make]:
        before = set(lite_client.list_collections())
        yield maker(lite_client, lite, strings=self.strings, metric=self.metric, index=self.index, dynamic=self.dynamic)
        drop_new(lite_client, before)

    def test_a_second_writer(self, make: Make) -> None:  # type: ignore[override]
        pytest.skip("stores of one process share its Milvus Lite; a second process has its own test below")


def drop_new(client: MilvusClient, before: set[str]) -> None:
    for name in set(client.list_collections()) - before:
        for alias in client.list_aliases(name)["aliases"]:
            client.drop_alias(alias)
        client.drop_collection(name)


class TestLite(InLite):
    pass


class TestLiteWithStrings(InLite):
    id_strategy = TEXTS
    metric, index = "IP", "FLAT"
    strings = True

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        return words()


class TestLiteWithoutDynamicField(InLite):
    metric, index, dynamic = "L2", "IVF_FLAT", False


class TestLiteThatCannotBeWatched(InLite):
    """Should its engine once count its writes in another place: slow, and right."""

    @pytest.fixture(autouse=True)
    def unwatched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Known, "_position", lambda _: None)


def test_in_lite_only_what_others_may_have_changed_is_asked_again(
    lite: str, lite_client: MilvusClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, old, new = list(range(40)), unit_vectors(40), unit_vectors(40, seed=1)
    rows = maker(lite_client, lite, strings=False, metric="IP", index="FLAT", dynamic=True)(ids, old, payloads_of(ids))
    assert isinstance(rows, Rows)
    asked: list[str] = []
    query = MilvusClient.query

    def watched(client: MilvusClient, name: str, *arguments: Any, **options: Any) -> Any:
        asked.append(name)
        return query(client, name, *arguments, **options)

    with closing(rows.open()) as store:
        page = store.scan(after=None, limit=20)
        monkeypatch.setattr(MilvusClient, "query", watched)
        assert list(store.write_vectors(ids[:10], new[:10], "new", expected=_part(page, 10)).written) == ids[:10]
        assert store.scan_ids(after=9, limit=100) == ids[10:]
        assert asked == []
        # What it wrote itself is not what the page says any more.
        assert list(store.write_vectors(ids[:1], new[5:6], "new", expected=_part(page, 1)).changed) == ids[:1]
        asked.clear()
        lite_client.delete(rows.name, filter="id in [11, 39]")
        report = store.write_vectors(ids[10:20], new[10:20], "new", expected=_part(page, 20, first=10))
        assert (list(report.written), list(report.deleted)) == ([10, *ids[12:20]], [11])
        assert asked
        assert store.scan_ids(after=9, limit=100) == [10, *ids[12:39]]
        assert store.unstamped("new", after=None, limit=100) == ids[20:39]
        assert store.count(stamp="new") == 19


def _part(page: Page, end: int, first: int = 0) -> Page:
    here = slice(first, end)
    return Page(page.ids[here], page.vectors[here], page.payloads[here], page.stamps[here])


@ON_THE_SERVER
class OnAServer(StoreContract):
    # Milvus 2.3.5 takes the largest 64-bit integer as a key and never finds it again.
    id_strategy: st.SearchStrategy[ItemId] = st.integers(-(2**63), 2**63 - 2)
    strings = False
    metric, index, dynamic = "COSINE", "HNSW", True

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        """Fewer: a server takes its time."""
        return [int(item) for item in np.random.default_rng(7).permutation(np.arange(-50, 350, 2))]

    @pytest.fixture
    def make(self, server: MilvusServer, server_client: MilvusClient) -> Iterator[Make]:
        before = set(server_client.list_collections())
        yield maker(
            server_client, server.uri, strings=self.strings, metric=self.metric, index=self.index, dynamic=self.dynamic
        )
        drop_new(server_client, before)


@pytest.mark.long
class TestServerWithIntegers(OnAServer):
    pass


@pytest.mark.long
class TestServerWithStrings(OnAServer):
    id_strategy = TEXTS
    metric, index = "IP", "IVF_FLAT"
    strings = True

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        return words()


class TestServer(OnAServer):
    """What differs most from Milvus Lite. A collection takes three seconds there; the rest is in the long form."""

    metric, index, strings = "L2", "IVF_FLAT", True

    @pytest.fixture
    def ids(self) -> list[ItemId]:
        return words()


ESSENTIAL = {
    "test_it_is_a_store_and_tells_the_facts",
    "test_read_keeps_the_order_asked_for_and_leaves_out_the_missing",
    "test_written_vectors_are_read_back_with_their_stamp",
    "test_what_changed_since_it_was_read_is_left_alone",
    "test_vectors_that_are_none_are_rejected_one_by_one",
    "test_stamps_are_counted_and_listed",
    "test_exact_search_is_brute_force",
    "test_a_rollback_gives_back_the_vectors_bit_for_bit",
    "test_items_are_replaced_and_removed",
    "test_a_collection_like_this_one_is_made_and_filled",
    "test_an_alias_is_moved_and_bars_the_way_to_dropping",
    "test_a_newer_write_of_the_application_wins",
    "test_a_deleted_item_stays_deleted",
    "test_an_item_that_arrives_is_found_by_its_missing_stamp",
}
for name in dir(StoreContract):
    if name.startswith("test_") and name not in ESSENTIAL:
        setattr(TestServer, name, None)
