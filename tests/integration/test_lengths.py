"""Collections whose vectors are not of unit length: with the metric cosine only their direction counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.kinds import Item, Kind, MilvusLite, QdrantFolder
from tests.world import World, embed_images, write_gallery

Migrator = Callable[..., int]
Printed = Callable[..., dict[str, Any]]


@pytest.fixture
def printed(migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Runs a command that must pass, and gives its JSON document."""

    def call(verb: str, *words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert migrator(verb, *words, "--json") == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


def scale(kind: Kind, lengths: np.ndarray) -> None:
    """The application writes its vectors at these lengths."""
    items = kind.items()
    vectors = np.stack([item.vector for item in items.values()]) * lengths[:, None].astype(np.float32)
    kind.put(list(items), vectors, [item.payload for item in items.values()])


def lengths(items: Mapping[Any, Item]) -> np.ndarray:
    return np.linalg.norm(np.stack([item.vector for item in items.values()]).astype(np.float64), axis=1)


def approximately(value: Any) -> Any:
    """`value` with each number compared up to rounding."""
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [approximately(inner) for inner in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


SAME = ("tests", "curve", "overlap", "flips", "classes", "threshold", "live", "outcome", "interval")
"""What a verification says that does not depend on the lengths of the stored vectors."""


@pytest.mark.parametrize("old", ["model", "stored"])
def test_milvus_with_the_metric_cosine_from_plan_to_rollback(
    world: World, migrator: Migrator, printed: Printed, old: str
) -> None:
    kind = MilvusLite(world)
    kind.use()
    world.configure(rollout__canary=[100], backfill__chunk_size=60, backfill__order="worst_first")
    if old == "stored":
        world.configure(old_encoder="stored")
    plan = printed("plan")
    verified = printed("verify", "--live")
    as_unit = kind.items()
    scale(kind, np.linspace(0.5, 20, 120))
    before = kind.items()
    assert lengths(before).min() == pytest.approx(0.5)
    assert lengths(before).max() == pytest.approx(20)

    again = printed("plan")
    assert {key: again[key] for key in ("old_encoder", "old_encoder_check", "risks")} == {
        key: plan[key] for key in ("old_encoder", "old_encoder_check", "risks")
    }
    assert again["forecast"]["today"] == plan["forecast"]["today"]
    found = printed("verify", "--live")
    assert {key: found[key] for key in SAME} == approximately({key: verified[key] for key in SAME})

    for words in (("prepare",), ("canary",), ("backfill",)):
        assert migrator("rollout", "--stage", *words) == 0
    ran = printed("backfill", "--max-items", "60")
    assert "search fell below" not in json.dumps(ran)
    mixed = printed("verify", "--mixed", "--live")
    half = kind.items()
    assert 0 < sum(half[item] == before[item] for item in before) < len(before)
    assert mixed["live"]["tests"]["mixed"]["map@100"] > 0
    assert migrator("backfill") == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    after = kind.items()
    np.testing.assert_allclose(lengths(after), 1, atol=1e-6)
    made = embed_images(world, "new", [item.payload["path"] for item in after.values()])
    assert all(item.near(vector) for item, vector in zip(after.values(), made, strict=True))
    assert migrator("rollback") == 0
    restored = kind.items()
    assert all(restored[item].vector.tobytes() == before[item].vector.tobytes() for item in before)
    assert not all(restored[item].near(as_unit[item].vector) for item in before)


def test_milvus_with_the_metric_cosine_and_a_shadow(world: World, migrator: Migrator) -> None:
    kind = MilvusLite(world)
    kind.use()
    scale(kind, np.linspace(0.5, 20, 120))
    before = kind.items()
    world.configure(rollout__canary=[100], rollout__strategy="shadow", backfill__chunk_size=60)
    assert migrator("plan") == migrator("verify") == 0
    for stage in ("prepare", "backfill"):
        assert migrator("rollout", "--stage", stage) == 0
    assert migrator("backfill") == 0
    for stage in ("canary", "cutover"):
        assert migrator("rollout", "--stage", stage) == 0
    np.testing.assert_allclose(lengths(kind.items()), 1, atol=1e-6)
    assert migrator("rollback") == 0
    assert kind.items() == before


@pytest.mark.parametrize("strategy", ["in_place", "shadow"])
def test_qdrants_local_mode_keeps_lengths_in_part(world: World, migrator: Migrator, strategy: str) -> None:
    """The client scales new points and updated vectors, but not a point that is written again, nor a tiny vector."""
    kind = QdrantFolder(world)
    kind.use()
    wanted = np.linspace(0.5, 20, 120)
    wanted[5] = 1e-8
    scale(kind, wanted)
    before = kind.items()
    np.testing.assert_allclose(lengths(before), wanted, rtol=1e-5)
    world.configure(rollout__canary=[100], rollout__strategy=strategy, backfill__chunk_size=60)
    assert migrator("plan") == migrator("verify") == migrator("rollout", "--stage", "prepare") == 0
    steps = [("rollout", "--stage", "canary"), ("rollout", "--stage", "backfill"), ("backfill",)]
    for words in steps if strategy == "in_place" else [*steps[1:], steps[0]]:
        assert migrator(*words) == 0
    assert migrator("rollout", "--stage", "cutover") == 0
    np.testing.assert_allclose(lengths(kind.items()), 1, rtol=1e-5)
    assert migrator("rollback") == 0
    after = kind.items()
    if strategy == "shadow":
        assert after == before
    for item, was in before.items():
        np.testing.assert_allclose(
            after[item].vector / np.linalg.norm(after[item].vector), was.vector / np.linalg.norm(was.vector), atol=1e-6
        )


@pytest.mark.parametrize(("factory", "metric"), [("Flat", "ip"), ("Flat", "l2")])
def test_other_metrics_look_at_lengths_and_the_plan_says_why(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], factory: str, metric: str
) -> None:
    import faiss

    write_gallery(world, range(120), [f"{number:05d}.png" for number in range(120)], factory=factory)
    vectors = world.vectors() * np.linspace(0.5, 20, 120)[:, None].astype(np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1]) if metric == "ip" else faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(world.gallery / "index.faiss"))
    capsys.readouterr()
    assert migrator("plan") == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert "not of unit length (sampled: 0.5 to 20)" in said
    assert f"the metric is {metric}, with which" in said
    assert "normalise the vectors first, or move them to a collection with the metric cosine" in said
