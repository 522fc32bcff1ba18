"""What a later command would refuse, and can be known at `plan`, is refused or said there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from migrator.project import Project
from tests.kinds import MilvusLite, QdrantFolder
from tests.world import DIM, World

Migrator = Callable[..., int]


@pytest.fixture
def plan(migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[int, Any, str]]:
    """Exit code, JSON document if there is one, and stderr of `migrator plan --json`."""

    def call() -> tuple[int, Any, str]:
        capsys.readouterr()
        code = migrator("plan", "--json")
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return call


class WithTextOnly(QdrantFolder):
    """A Qdrant collection for hybrid search, in which one point has sparse vectors alone, and no image."""

    def use(self) -> None:
        super().use()
        from qdrant_client import models

        with self.client() as client:
            points = client.scroll("toys_v1", limit=1000, with_vectors=True)[0]
            client.delete_collection("toys_v1")
            client.create_collection(
                "toys_v1",
                {"image": models.VectorParams(size=DIM, distance=models.Distance.COSINE)},
                sparse_vectors_config={"words": models.SparseVectorParams()},
            )
            client.upsert(
                "toys_v1",
                [
                    models.PointStruct(
                        id=point.id,
                        vector={"image": point.vector, "words": models.SparseVector(indices=[3], values=[1.0])},
                        payload=point.payload,
                    )
                    for point in points
                ]
                + [
                    models.PointStruct(
                        id=999,
                        vector={"words": models.SparseVector(indices=[5], values=[1.0])},
                        payload={"kind": "text"},
                    )
                ],
            )
            alias = models.CreateAlias(collection_name="toys_v1", alias_name="toys")
            client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "vector": "image"}


def test_a_shadow_that_would_lose_points_is_refused_by_the_plan(world: World, plan: Any) -> None:
    kind = WithTextOnly(world)
    kind.use()
    world.configure(rollout__strategy="shadow")
    code, _, err = plan()
    assert code == 3
    assert "toys_v1 cannot be copied whole into a shadow: " in err
    assert "in_place" in err
    with kind.client() as client:
        assert [found.name for found in client.get_collections().collections] == ["toys_v1"]
    world.configure(new_encoder__dim=32)
    assert f"in_place needs an encoder with {DIM}-d vectors" in plan()[2]

    # The way out is taken: in place nothing of it is touched, and no shadow is recommended.
    world.configure(new_encoder__dim=DIM, rollout__strategy="in_place")
    code, found, err = plan()
    assert code == 0, err
    assert found["recommended"]["strategy"] == "in_place"
    assert any(sentence.startswith("a shadow is refused here: ") for sentence in found["capabilities"])


@pytest.mark.parametrize(("at", "code"), [("the check", 3), ("the shadow", 2)])
def test_a_refused_shadow_leaves_no_collection_behind(
    world: World,
    migrator: Migrator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: str,
    code: int,
) -> None:
    from pymilvus import MilvusClient, MilvusException

    kind = MilvusLite(world)
    kind.use()
    world.configure(rollout__strategy="shadow", rollout__canary=[100])
    assert migrator("plan") == migrator("verify") == migrator("rollout", "--stage", "prepare") == 0
    with Project.open(world.config) as project:
        shadow = project.migration().shadow
    create_index = MilvusClient.create_index

    def refuse(client: Any, name: str, *arguments: Any, **options: Any) -> Any:
        if at == "the check" or name == shadow:
            raise MilvusException(1, "no room for another index")
        return create_index(client, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "create_index", refuse)
        capsys.readouterr()
        assert migrator("rollout", "--stage", "backfill") == code
    assert "no room for another index" in capsys.readouterr().err
    with kind.client() as client:
        assert client.list_collections() == ["toys_v1"]
    assert migrator("rollout", "--stage", "backfill") == 0
    assert migrator("backfill") == 0


@pytest.mark.parametrize(
    ("train", "trains"),
    [
        (None, False),
        ({"items": {"from": "store"}}, False),
        ({"items": {"from": "store"}, "method": "ridge", "batch_size": 50}, True),
    ],
)
def test_a_finished_encoder_is_not_trained(
    world: World, plan: Any, migrator: Migrator, capsys: pytest.CaptureFixture[str], train: Any, trains: bool
) -> None:
    if train is not None:
        world.configure(train=train)
    code, found, err = plan()
    assert code == 0, err
    commands = [stage for stage, _ in found["stages"]]
    assert commands[: 2 if trains else 1] == (["train", "verify"] if trains else ["verify"])
    assert (found["new_encoder"]["id"] is None) is trains
    assert migrator("status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["next_command"] == f"migrator {commands[0]} toys"
    assert migrator(commands[0]) == 0
    with Project.open(world.config) as project:
        assert project.trains() is trains


def test_an_encoder_to_train_needs_a_local_folder_and_the_plan_says_so(world: World, plan: Any) -> None:
    import yaml

    document = yaml.safe_load(world.config.read_text())
    document["artifacts"] = "memory://artifacts"
    world.config.write_text(yaml.safe_dump(document))
    assert plan()[0] == 0
    world.configure(train={"items": {"from": "store"}, "method": "ridge"})
    code, _, err = plan()
    assert code == 2
    assert "training needs a local folder" in err
