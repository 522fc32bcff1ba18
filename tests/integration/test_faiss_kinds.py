"""Indexes as clip-retrieval, autofaiss and users of `index_factory` build them, from plan to rollback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from tests.faiss_facts import facts
from tests.world import DIM, World, embed_images, encoder_config

Migrator = Callable[..., int]

NAMES = [f"{number:05d}.png" for number in range(120)]


def built(factory: str, content: np.ndarray, metric: int) -> Any:
    """As a user builds it."""
    rng = np.random.default_rng(0)
    more = content[rng.integers(0, len(content), 300)] + 0.05 * rng.standard_normal((300, DIM))
    more /= np.linalg.norm(more, axis=1, keepdims=True)
    index = faiss.index_factory(DIM, factory, metric)
    index.train(np.concatenate([content, more]).astype(np.float32))
    if "IDMap" in factory:
        index.add_with_ids(content, np.arange(len(content)))
    else:
        index.add(content)
    return index


def put(world: World, factory: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    """The gallery's index built by a factory string, on more vectors than it holds; nprobe and efSearch set."""
    index = built(factory, embed_images(world, "old", NAMES), metric)
    if (lists := faiss.try_extract_index_ivf(index)) is not None:
        lists.nprobe = 5
        quantizer = faiss.downcast_index(lists.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = 29
    faiss.write_index(index, str(world.gallery / "index.faiss"))
    return index


def go(migrator: Migrator, strategy: str) -> None:
    assert migrator("plan") == 0
    assert migrator("verify") == 0
    assert migrator("rollout", "--stage", "prepare") == 0
    canary = [("rollout", "--stage", "canary")]
    backfill = [("rollout", "--stage", "backfill"), ("backfill",)]
    for words in [*canary, *backfill] if strategy == "in_place" else [*backfill, *canary]:
        assert migrator(*words) == 0
    assert migrator("rollout", "--stage", "cutover") == 0


def found(index: Any, queries: np.ndarray, content: np.ndarray, metric: int) -> float:
    truth = faiss.knn(queries, content, 5, metric=metric)[1]
    rows = index.search(queries, 5)[1]
    return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows, truth, strict=True)]))


IN_PLACE = [
    "OPQ4_16,IVF8_HNSW8,PQ8x4",  # what autofaiss chooses, made small
    "L2norm,Flat",
    "IDMap2,OPQ8,IVF8,PQ8x4,RFlat",
    "IMI2x2,Flat",
]


@pytest.mark.parametrize("factory", IN_PLACE)
def test_in_place_and_back(world: World, migrator: Migrator, factory: str) -> None:
    metric = faiss.METRIC_L2 if factory.startswith("IMI") else faiss.METRIC_INNER_PRODUCT
    was = put(world, factory, metric)
    file = world.gallery / "index.faiss"
    before = file.read_bytes()
    world.configure(rollout__strategy="in_place")
    go(migrator, "in_place")
    new = embed_images(world, "new", NAMES)
    now = faiss.read_index(str(file))
    assert facts(now) == facts(was)
    fresh = built(factory, new, metric)
    if (lists := faiss.try_extract_index_ivf(fresh)) is not None:
        lists.nprobe = 5
    assert found(now, new, new, metric) >= found(fresh, new, new, metric) - 0.1
    assert migrator("rollback") == 0
    assert file.read_bytes() == before


@pytest.mark.parametrize("factory", ["IVF8_HNSW8,Flat", "OPQ4_16,IVF8_HNSW8,PQ8x4"])
def test_a_shadow_of_another_dimension(world: World, migrator: Migrator, factory: str) -> None:
    import torch

    from migrator.trainer.encoders.building import build_model
    from migrator.trainer.encoders.saving import save_encoder
    from migrator.trainer.encoders.spec import EncoderSpec
    from migrator.trainer.images.preprocessing import Preprocessing

    was = put(world, factory)
    before = (world.gallery / "index.faiss").read_bytes()
    torch.manual_seed(7)
    spec = EncoderSpec(arch="test_resnet", dim=40, preprocessing=Preprocessing(image_size=16))
    save_encoder(build_model(spec), spec, world.folder / "wide.safetensors")
    world.configure(new_encoder={**encoder_config("wide.safetensors"), "dim": 40}, rollout__strategy="shadow")
    go(migrator, "shadow")
    (shadow,) = world.folder.glob("gallery__*")
    now = faiss.read_index(str(shadow / "index.faiss"))
    assert (now.d, now.ntotal) == (40, len(NAMES))
    assert facts(now) == facts(was)
    assert migrator("rollback") == 0
    assert (world.gallery / "index.faiss").read_bytes() == before


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("RQ2x4", "index.faiss is IndexResidualQuantizer, whose vectors cannot be replaced safely"),
        ("IVF8,PQ8x4fs", 'add a refinement ("IVF8,PQ8x4fs,RFlat")'),
        ("ITQ16,Flat", "index.faiss is ITQTransform,Flat, whose"),
    ],
)
def test_what_is_not_understood_is_refused_by_plan(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], factory: str, words: str
) -> None:
    put(world, factory)
    assert migrator("plan") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("migrator:")]
    assert words in line
    assert not Path(world.gallery / ".migrator").exists()


def test_plan_says_what_stays_as_it_was_trained(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    put(world, "IVF8(SQ8),Flat")
    world.configure(rollout__strategy="in_place")
    assert migrator("plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["collection"]["index"] == "IVF8(SQ8),Flat (nprobe=5)"
    assert any("cannot train the coarse quantizer SQ8 of IVF8(SQ8),Flat again" in line for line in plan["capabilities"])


def test_another_encoder_is_refused_where_the_index_keeps_coarse_approximations(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    put(world, "OPQ4_16,IVF8_HNSW8,PQ8x4")
    world.configure(old_encoder=encoder_config("new.safetensors"), rollout__strategy="in_place")
    assert migrator("plan") == 3
    assert "were not made by this encoder" in capsys.readouterr().err


def test_what_faiss_refuses_at_the_cutover_is_no_bug(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(world, "IMI2x2,Flat", faiss.METRIC_L2)
    before = (world.gallery / "index.faiss").read_bytes()
    world.configure(rollout__strategy="in_place")
    for stage in ("plan", "verify", "prepare", "canary", "backfill"):
        assert migrator(*([stage] if stage in ("plan", "verify") else ["rollout", "--stage", stage])) == 0
    assert migrator("backfill") == 0

    def refuses(*_: Any) -> None:
        raise RuntimeError("Error in void faiss::f() at /project/a.cpp:3: Error: 'n > 0' failed: cannot train this")

    with monkeypatch.context() as patch:
        patch.setattr(faiss.IndexIVFFlat, "train", refuses)
        assert migrator("rollout", "--stage", "cutover") == 2
    assert "FAISS cannot rebuild the index ('n > 0' failed: cannot train this): nothing" in capsys.readouterr().err
    assert migrator("rollback") == 0
    assert (world.gallery / "index.faiss").read_bytes() == before
