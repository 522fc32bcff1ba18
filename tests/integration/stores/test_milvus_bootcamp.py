"""An image search as Milvus' own tutorial builds it, migrated there and back by the commands that a user types.

Keys that Milvus makes (auto_id), a path, a dynamic field with nested metadata, COSINE, and vectors that nobody has
normalised. What lies in the collections is read with pymilvus alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient

from tests.milvus_server import ON_THE_SERVER, MilvusServer
from tests.world import DIM, World, embed_images

Migrator = Callable[..., int]
ITEMS = 60
NAMES = [f"{number:05d}.png" for number in range(ITEMS)]


@contextmanager
def client(uri: str) -> Iterator[MilvusClient]:
    """The application's. Milvus Lite is given back, for the next command is another process for a user."""
    found = MilvusClient(uri, timeout=30)
    try:
        yield found
    finally:
        found.close()
        if "://" not in uri:
            from milvus_lite import server_manager_instance

            server_manager_instance.release_server(uri)


def build(uri: str, world: World, index: str, params: dict[str, Any]) -> list[int]:
    """The collection, and an alias; returns the keys."""
    with client(uri) as application:
        schema = application.create_schema(auto_id=True, enable_dynamic_field=True, description="image search")
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("path", DataType.VARCHAR, max_length=500)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=DIM)
        parameters = application.prepare_index_params()
        parameters.add_index("embedding", index_type=index, metric_type="COSINE", params=params)
        application.create_collection("image_search", schema=schema, properties={"collection.ttl.seconds": 10**8})
        application.create_index("image_search", parameters, sync=False)
        application.load_collection("image_search")
        application.create_alias("image_search", "pictures")
        vectors = embed_images(world, "old", NAMES) * np.linspace(0.2, 30, ITEMS, dtype=np.float32)[:, None]
        rows = [
            {"path": name, "embedding": vectors[row], "metadata": {"kind": f"kind {row % 3}", "seen": float("nan")}}
            if row == 7
            else {"path": name, "embedding": vectors[row], "metadata": {"kind": f"kind {row % 3}"}}
            for row, name in enumerate(NAMES)
        ]
        return list(application.insert("image_search", rows)["ids"])


def rows_of(uri: str, name: str) -> dict[int, tuple[str, str, bytes]]:
    with client(uri) as application:
        application.load_collection(name)
        rows = application.query(
            name, filter='path >= ""', output_fields=["*"], limit=1000, consistency_level="Strong", strict_float32=True
        )
        return {
            row["id"]: (row["path"], repr(row["metadata"]), np.array(row["embedding"], np.float32).tobytes())
            for row in rows
        }


def collections(uri: str) -> list[str]:
    with client(uri) as application:
        return sorted(application.list_collections())


def made_by_new(world: World, rows: dict[int, tuple[str, str, bytes]]) -> bool:
    found = np.array([np.frombuffer(row[2], np.float32) for row in rows.values()])
    return np.allclose(found, embed_images(world, "new", [row[0] for row in rows.values()]), atol=1e-5)


def configure(world: World, uri: str, strategy: str, **more: Any) -> None:
    world.configure(
        store={"kind": "milvus", "uri": uri, "collection": "pictures", **more},
        verify__label="{metadata.kind}",
        rollout__strategy=strategy,
        rollout__canary=[100],
    )


@pytest.fixture
def file(world: World) -> str:
    return str(world.folder / "milvus.db")


def test_in_place_in_milvus_lite(world: World, migrator: Migrator, file: str) -> None:
    keys = build(file, world, "HNSW", {"M": 8, "efConstruction": 64})
    before = rows_of(file, "image_search")
    configure(world, file, "in_place")
    for words in (("plan",), ("verify",), ("rollout", "--stage", "prepare"), ("rollout", "--stage", "canary")):
        assert migrator(*words) == 0, words
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    after = rows_of(file, "image_search")
    assert sorted(after) == sorted(keys)
    assert made_by_new(world, after)
    assert {key: row[:2] for key, row in after.items()} == {key: row[:2] for key, row in before.items()}
    assert migrator("rollback") == 0
    assert rows_of(file, "image_search") == before
    assert collections(file) == ["image_search"]


def refused(world: World, migrator: Migrator, uri: str, capsys: pytest.CaptureFixture[str], said: str) -> None:
    """At the plan, in a line, and nothing is there that was not there before."""
    before = collections(uri)
    capsys.readouterr()
    assert migrator("plan") == 3
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err
    assert collections(uri) == before


def shadow_there_and_back(world: World, migrator: Migrator, uri: str, keys: list[int]) -> None:
    """With `keep_keys`; the application adds, changes and deletes rows after the cutover."""
    before = rows_of(uri, "image_search")
    for words in (("plan",), ("verify",), ("rollout", "--stage", "prepare"), ("rollout", "--stage", "backfill")):
        assert migrator(*words) == 0, words
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    (shadow,) = (name for name in collections(uri) if name != "image_search")
    copied = rows_of(uri, shadow)
    assert sorted(copied) == sorted(keys)
    assert made_by_new(world, copied)
    assert {key: row[:2] for key, row in copied.items()} == {key: row[:2] for key, row in before.items()}
    assert rows_of(uri, "image_search") == before
    with client(uri) as application:
        described = application.describe_collection("pictures")
        assert described["collection_name"] == shadow
        assert (described["auto_id"], described["properties"]) == (False, {"collection.ttl.seconds": "100000000"})
        assert described.get("description", "") in ("image search", "")  # Milvus Lite keeps none


def test_a_shadow_in_milvus_lite(
    world: World, migrator: Migrator, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = build(file, world, "AUTOINDEX", {})
    before = rows_of(file, "image_search")
    configure(world, file, "shadow")
    refused(world, migrator, file, capsys, "set store.auto_id_in_shadow to keep_keys")
    configure(world, file, "shadow", auto_id_in_shadow="keep_keys")
    shadow_there_and_back(world, migrator, file, keys)
    assert migrator("rollback") == 0
    assert rows_of(file, "image_search") == before
    assert collections(file) == ["image_search"]


@ON_THE_SERVER
def test_a_shadow_on_a_server(
    world: World,
    migrator: Migrator,
    server: MilvusServer,
    server_client: MilvusClient,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = build(server.uri, world, "IVF_FLAT", {"nlist": 4})
    before = rows_of(server.uri, "image_search")
    configure(world, server.uri, "in_place")
    refused(world, migrator, server.uri, capsys, "writes no row under a given key: set rollout.strategy to shadow")
    configure(world, server.uri, "shadow")
    refused(world, migrator, server.uri, capsys, "set store.auto_id_in_shadow to keep_keys")
    configure(world, server.uri, "shadow", auto_id_in_shadow="keep_keys")
    shadow_there_and_back(world, migrator, server.uri, keys)
    # The application goes on in the shadow. Its server writes no row under a given key into the old collection.
    new = {"path": NAMES[0], "embedding": embed_images(world, "new", NAMES[:1])[0], "metadata": {"kind": "kind 1"}}
    server_client.upsert("pictures", [{"id": 5, **new}, {"id": keys[3], **new}])
    server_client.delete("pictures", filter=f"id in [{keys[4]}]")
    capsys.readouterr()
    assert migrator("rollback") == 3
    out, _ = capsys.readouterr()
    assert "is kept" in out
    for key in (5, keys[3]):
        assert f"item {key} " in out
    left = {key: row for key, row in before.items() if key != keys[4]}
    assert rows_of(server.uri, "image_search") == left
    (shadow,) = (name for name in collections(server.uri) if name != "image_search")
    assert {5, keys[3]} < set(rows_of(server.uri, shadow))
    assert server_client.describe_collection("pictures")["collection_name"] == "image_search"
    for alias in ("pictures",):
        server_client.drop_alias(alias)
    for name in collections(server.uri):
        server_client.drop_collection(name)
