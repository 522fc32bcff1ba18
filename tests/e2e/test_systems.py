"""Systems of others, from `migrator init` to the rollback, by the commands that their owners type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from migrator.cli import run
from tests.support.systems import SYSTEMS, System

Call = Callable[..., int]


@pytest.fixture(params=SYSTEMS, ids=lambda system: system.name)
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[System]:
    system: System = request.param(tmp_path / "app")
    with system.running():
        yield system


@pytest.fixture
def call(system: System) -> Call:
    def call(verb: str, *arguments: str) -> int:
        yes = ["--yes"] if verb in ("rollout", "backfill", "rollback") else []
        return run([verb, "--config", str(system.folder / "migrations.yaml"), *arguments, *yes])

    return call


def fill_in(system: System, **changes: Any) -> None:
    """What `init` leaves to the owner: the two encoders. Untrained ones pass no gate, so it is opened wide."""
    file = system.folder / "migrations.yaml"
    document = yaml.safe_load(file.read_text())
    (migration,) = document["migrations"].values()
    migration["old_encoder"] = system.encoder("old")
    migration["new_encoder"] = system.encoder("new")
    migration["verify"]["gate"] = {"min_gain": -1.0, "resamples": 200}
    migration["verify"]["sample"] = 60
    migration["backfill"] = {"chunk_size": 50, "batch_size": 32, "retry_for": 0.0}
    for path, value in changes.items():
        section, key = path.split("__")
        migration[section][key] = value
    file.write_text(yaml.safe_dump(document))


def near(vectors: np.ndarray, expected: np.ndarray) -> float:
    """Median cosine of rows."""
    cosines = np.einsum("nd,nd->n", vectors, expected)
    return float(np.median(cosines / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)))


def test_from_init_to_rollback(system: System, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    before, vectors = system.snapshot(), system.vectors()
    assert run(["init", str(system.folder / "migrations.yaml"), *system.init()]) == 0
    assert "fill in old_encoder, new_encoder," in capsys.readouterr().out
    fill_in(system, **system.changes())
    assert call("config") == 0
    capsys.readouterr()
    assert call("plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["old_encoder_check"]["median_cosine"] > 0.999
    assert "train" not in [stage for stage, _ in plan["stages"]]
    assert call("verify") == 0
    assert call("rollout", "--stage", "prepare") == 0
    stages = ["backfill", *["canary"] * 4] if plan["strategy"] == "shadow" else [*["canary"] * 4, "backfill"]
    for stage in stages:
        assert call("rollout", "--stage", stage) == 0
        if stage == "backfill":
            assert call("backfill") == 0
    assert call("rollout", "--stage", "cutover") == 0
    capsys.readouterr()
    assert call("route", "--json") == 0
    route = json.loads(capsys.readouterr().out)
    # As near as the index, which may keep approximations, held the old ones.
    held = near(vectors, system.embed("old"))
    exact = held > 0.999
    assert near(system.vectors(route["query_collection"]), system.embed("new")) > (0.999 if exact else held - 0.05)
    assert call("rollback") == 0
    np.testing.assert_array_equal(system.vectors(), vectors)
    assert system.snapshot() == before
