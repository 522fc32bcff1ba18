"""Migrations of Qdrant collections as people have them: several vectors, metadata, payloads with NaN, nested payloads.

By the commands that a user types; what is compared is what qdrant_client's own `retrieve` gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from migrator.adapters.base import StoreRejected
from migrator.project import Project
from tests.integration.test_stores import expected, prepared_shadow, to_prepared
from tests.kinds import FaissFolder, Kind, QdrantEdge, QdrantFolder, QdrantOverRest
from tests.qdrant_front import qdrant_front
from tests.qdrant_grpc import grpc_door
from tests.world import DIM, World, embed_images

Call = Callable[..., int]
METADATA = {"owner": "shop", "loader": {"version": 7, "ratio": 1.0, "note": None}}


def further(item: int) -> dict[str, Any]:
    """What lies beside an item's image vector; every fourth lacks one of these."""
    found: dict[str, Any] = {
        "text": [0.25 * item, -1.0, 3.5],
        "tokens": [[0.5, float(row)] for row in range(item % 3 + 1)],
        "words": {"indices": [item, 4_000_000_000], "values": [0.5, float(item)]},
    }
    for name, rest in (("text", 1), ("tokens", 2), ("words", 3)):
        if item % 4 == rest:
            found.pop(name)
    return found


class Several(QdrantFolder):
    """The world's items with a dense, a multi- and a sparse vector beside the image vector."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "vector": "image"}

    @contextmanager
    def client(self) -> Iterator[Any]:
        from qdrant_client import models

        with closing(self.connected()) as client:
            if not client.get_collections().collections:
                tokens = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
                client.create_collection(
                    "toys_v1",
                    {
                        "image": models.VectorParams(size=DIM, distance="Cosine"),
                        "text": models.VectorParams(size=3, distance="Dot"),
                        "tokens": models.VectorParams(size=2, distance="Dot", multivector_config=tokens),
                    },
                    sparse_vectors_config={"words": models.SparseVectorParams(modifier="idf")},
                    metadata=METADATA,
                )
                alias = models.CreateAlias(collection_name="toys_v1", alias_name="toys")
                client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
            yield client

    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        from qdrant_client import models

        points = []
        for item, vector, payload in zip(ids, vectors, payloads, strict=True):
            named = {"image": vector.tolist(), **further(item)}
            if "words" in named:
                named["words"] = models.SparseVector(**named["words"])
            points.append(models.PointStruct(id=item, vector=named, payload=dict(payload)))
        with self.client() as client:
            client.upsert("toys", points)

    def replace_words(self, item: int, values: list[float]) -> None:
        """The application changes a further vector, and leaves everything else alone."""
        from qdrant_client import models

        words = models.SparseVector(indices=[1, 2], values=values)
        with self.client() as client:
            client.update_vectors("toys", [models.PointVectors(id=item, vector={"words": words})])

    def retrieved(self, collection: str = "toys") -> dict[Any, tuple[dict[str, Any], dict[str, Any]]]:
        """Payload and further vectors of everything, by the client's own means."""
        with self.client() as client:
            ids = [record.id for record in client.scroll(collection, limit=10_000)[0]]
            found = {}
            for record in client.retrieve(collection, ids, with_vectors=True):
                vectors = json.loads(record.model_dump_json())["vector"]
                found[record.id] = (record.payload, {k: v for k, v in vectors.items() if k != "image"})
            return found

    def description(self, collection: str = "toys") -> Any:
        with self.client() as client:
            return client.get_collection(collection).config


class SeveralOverRest(Several, QdrantOverRest):
    pass


class SeveralOverGrpc(SeveralOverRest):
    port = 0

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "grpc": True, "grpc_port": self.port}


@pytest.fixture(autouse=True)
def _few_steps(world: World) -> None:
    world.configure(rollout__canary=[100], backfill__chunk_size=40, backfill__measure=False)


@pytest.fixture
def several(request: pytest.FixtureRequest, world: World) -> Iterator[Several]:
    how = getattr(request, "param", "folder")
    if how == "folder":
        kind = Several(world)
        kind.use()
        yield kind
        return
    with qdrant_front() as front, grpc_door(front) as port:
        kind = (SeveralOverRest if how == "rest" else SeveralOverGrpc)(world, front.url)
        if isinstance(kind, SeveralOverGrpc):
            kind.port = port
        kind.use()
        yield kind


@pytest.mark.parametrize("several", ["folder", "rest", "grpc"], indirect=True)
def test_a_shadow_carries_everything_there_and_back(
    several: Several, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    before = several.retrieved()
    assert before[4][1].keys() == {"text", "tokens", "words"}
    shadow = prepared_shadow(world, migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert several.description(shadow) == several.description()
    assert several.description(shadow).metadata == METADATA
    assert migrator("backfill", "--max-items", "50") == 0
    several.replace_words(4, [1.0, 2.0])  # of an item that has been copied: found although its payload is the same
    assert migrator("backfill") == 0
    assert several.retrieved(shadow) == several.retrieved()
    assert several.retrieved(shadow)[4][1]["words"]["values"] == [1.0, 2.0]
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert several.retrieved() == several.retrieved(shadow)
    assert expected(several, "new", shadow)
    # After the cutover the application writes to the shadow, and all of it comes home.
    several.upsert_images([500], ["00007.png"], "new")
    several.replace_words(8, [3.0, 4.0])
    after = several.retrieved()
    capsys.readouterr()
    assert migrator("rollback", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["re_encoded"], result["problems"]) == (2, {})
    assert not several.exists(shadow)
    assert several.retrieved() == after
    assert {item: found for item, found in after.items() if item not in (4, 8, 500)} == {
        item: found for item, found in before.items() if item not in (4, 8)
    }
    assert expected(several, "old")
    assert several.description().metadata == METADATA


@pytest.mark.parametrize("several", ["folder", "rest"], indirect=True)
def test_in_place_leaves_everything_else_alone(several: Several, migrator: Call) -> None:
    before, items = several.retrieved(), several.items()
    to_prepared(migrator)
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert expected(several, "new")
    found = several.retrieved()
    assert {item: vectors for item, (_, vectors) in found.items()} == {k: v for k, (_, v) in before.items()}
    assert migrator("rollback") == 0
    assert several.retrieved() == before
    assert all(item.near(items[key].vector) for key, item in several.items().items())


class SeveralOnTheEdge(QdrantEdge):
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "vector": "image"}

    @contextmanager
    def shard(self) -> Iterator[Any]:
        import qdrant_edge as e

        if not self.folder.exists():
            (self.folder / "toys_v1").mkdir(parents=True)
            tokens = e.MultiVectorConfig(e.MultiVectorComparator.MaxSim)
            config = e.EdgeConfig(
                vectors={
                    "image": e.EdgeVectorParams(DIM, e.Distance.Cosine),
                    "text": e.EdgeVectorParams(3, e.Distance.Dot),
                    "tokens": e.EdgeVectorParams(2, e.Distance.Dot, multivector_config=tokens),
                },
                sparse_vectors={"words": e.EdgeSparseVectorParams(on_disk=True)},
            )
            e.EdgeShard.create(str(self.folder / "toys_v1"), config).close()
            (self.folder / "toys").symlink_to("toys_v1")
        with super().shard() as shard:
            yield shard

    def put(self, ids: Sequence[Any], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        import qdrant_edge as e

        points = []
        for item, vector, payload in zip(ids, vectors, payloads, strict=True):
            named = {"image": vector.tolist(), **further(item)}
            if "words" in named:
                named["words"] = e.SparseVector(**named["words"])
            points.append(e.Point(item, named, dict(payload)))
        self._update(e.UpdateOperation.upsert_points(points))

    def held(self) -> list[Any]:
        import qdrant_edge as e

        with self.shard() as shard:
            records, _ = shard.scroll(e.ScrollRequest(limit=10_000, with_payload=True, with_vector=True))
            return [
                (record.id, record.payload, {k: str(v) for k, v in sorted(record.vector.items()) if k != "image"})
                for record in records
            ]


def test_a_shadow_carries_everything_there_and_back_on_the_edge(world: World, migrator: Call) -> None:
    kind = SeveralOnTheEdge(world)
    kind.use()
    before = kind.held()
    shadow = prepared_shadow(world, migrator)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert (kind.folder / "toys").resolve().name == shadow
    assert kind.held() == before
    assert expected(kind, "new")
    assert migrator("rollback") == 0
    assert kind.held() == before
    assert expected(kind, "old")
    assert not kind.exists(shadow)


# -- payloads ---------------------------------------------------------------------------------------------------------


STRANGE = {
    "price": float("nan"),
    "sizes": [1, 2.0, float("nan"), {"deep": [float("inf"), float("nan")]}],
    "count": 1,
    "ratio": 1.0,
    "big": 2**60 + 1,
    "when": "2024-05-06T07:08:09.123456Z",
    "place": {"lon": 13.4, "lat": 52.5},
    "number": "0b9a2c34-8a3c-4d2f-9a55-0242ac120002",
    "none": None,
    "empty": {},
}


@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_a_payload_that_did_not_change_is_unchanged(
    world: World, migrator: Call, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    """NaN, which equals nothing, not even itself, is kept by a local folder."""
    kind = QdrantFolder(world)
    kind.use()
    with kind.client() as client:
        client.set_payload("toys", STRANGE, points=list(range(60)))
        before = {record.id: repr(record.payload) for record in client.scroll("toys", limit=999)[0]}
    assert "nan" in before[0]
    if strategy == "shadow":
        prepared_shadow(world, migrator)
    else:
        to_prepared(migrator)
        assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "backfill") == 0
    capsys.readouterr()
    assert migrator("backfill", "--json") == 0
    assert json.loads(capsys.readouterr().out)["items"] == 120
    with Project.open(world.config) as project:
        counts = project.ledger.counts(project.migration().id)
        assert (counts.done, counts.passes, counts.open_failures) == (120, 1, 0)
    if strategy == "shadow":
        assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    assert expected(kind, "new")
    assert migrator("rollback") == 0
    assert expected(kind, "old")
    with kind.client() as client:
        assert {record.id: repr(record.payload) for record in client.scroll("toys", limit=999)[0]} == before


def test_payloads_as_langchain_lays_them_out(world: World, migrator: Call) -> None:
    """`page_content` and `metadata`: the image's place lies one level deeper."""
    with qdrant_front() as front:
        kind = QdrantOverRest(world, front.url)
        put = kind.put

        def nested(ids: Any, vectors: Any, payloads: Sequence[Mapping[str, Any]]) -> None:
            put(ids, vectors, [{"page_content": "", "metadata": {**each, "page": None}} for each in payloads])

        kind.put = nested  # type: ignore[method-assign]
        kind.use()
        world.configure(images__uri="{metadata.path}", verify__label="{metadata.kind}")
        prepared_shadow(world, migrator)
        assert migrator("rollout", "--stage", "backfill") == 0
        assert migrator("backfill") == 0
        assert migrator("rollout", "--stage", "canary") == 0
        assert migrator("rollout", "--stage", "cutover") == 0
        items = kind.items()
        new = embed_images(world, "new", [item.payload["metadata"]["path"] for item in items.values()])
        assert all(item.near(vector) for item, vector in zip(items.values(), new, strict=True))
        metadata = {"path": "00003.png", "kind": "kind 0", "page": None}
        assert items[3].payload == {"page_content": "", "metadata": metadata}


# -- what is refused leaves nothing -----------------------------------------------------------------------------------


def without_image(kind: Several) -> None:
    from qdrant_client import models

    with kind.client() as client:
        client.upsert("toys", [models.PointStruct(id=900, vector={"text": [1.0, 2.0, 3.0]}, payload={})])


def test_points_without_the_vector_are_told_by_plan(
    several: Several, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    without_image(several)
    world.configure(rollout__strategy="shadow")
    assert migrator("plan") == 3
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 points without the vector 'image'" in told
    assert "in_place" in told
    # The advice: in place it is no item, and stays.
    world.configure(rollout__strategy="in_place")
    assert migrator("plan") == 0
    assert several.retrieved()[900][1] == {"text": [1.0, 2.0, 3.0]}


def test_a_stage_that_is_refused_leaves_no_collection(
    several: Several, world: World, migrator: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow = prepared_shadow(world, migrator)
    without_image(several)  # since the plan
    before = several.retrieved()
    capsys.readouterr()
    assert migrator("rollout", "--stage", "backfill") == 3
    assert "without the vector 'image'" in capsys.readouterr().err
    assert not several.exists(shadow)
    assert several.retrieved() == before
    several.delete([900])
    assert migrator("rollout", "--stage", "backfill") == 0
    assert several.exists(shadow)
    assert migrator("rollback") == 0
    assert not several.exists(shadow)


@pytest.mark.parametrize("kind_of", [QdrantFolder, QdrantEdge, FaissFolder])
def test_a_store_that_refuses_half_way_keeps_no_collection(
    kind_of: type[Kind], world: World, migrator: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an adapter leaves behind, the stage cleans up."""
    kind = kind_of(world)
    kind.use()
    shadow = prepared_shadow(world, migrator)
    create_like = kind.adapter().create_like

    def half(store: Any, collection_id: str, *, dim: int) -> Any:
        create_like(store, collection_id, dim=dim).close()
        raise StoreRejected("an index cannot be made")

    with monkeypatch.context() as patch:
        patch.setattr(kind.adapter(), "create_like", half)
        assert migrator("rollout", "--stage", "backfill") == 2
    assert not kind.exists(shadow)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert kind.exists(shadow)


def test_a_route_that_moved_meanwhile_leaves_no_collection(
    world: World, migrator: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from migrator.rollout.stages import StageTransition

    kind = QdrantFolder(world)
    kind.use()
    shadow = prepared_shadow(world, migrator)
    move: Any = StageTransition._move_route

    def late(transition: StageTransition, route: Any, **columns: Any) -> None:
        with transition.project.store() as store:
            assert store.exists(shadow)
        move(transition, SimpleNamespace(epoch=route.epoch - 1), **columns)

    with monkeypatch.context() as patch:
        patch.setattr(StageTransition, "_move_route", late)
        assert migrator("rollout", "--stage", "backfill") == 3
    assert not kind.exists(shadow)
    assert migrator("rollout", "--stage", "backfill") == 0
    assert kind.exists(shadow)
