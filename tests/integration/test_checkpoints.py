"""A checkpoint of a training script as the old encoder, from a refused plan to one that passes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.world import World

Migrator = Callable[..., int]


def test_plan_asks_which_of_two_networks_made_the_vectors(
    world: World, migrator: Migrator, capsys: pytest.CaptureFixture[str]
) -> None:
    old = load_file(world.folder / "old.safetensors")
    within = {f"module.{name}": tensor for name, tensor in old.items()}
    other = load_file(world.folder / "new.safetensors")
    checkpoint = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": other, "state_dict_ema": within}
    torch.save(checkpoint, world.folder / "last.pth.tar")
    world.configure(old_encoder__weights="last.pth.tar")
    assert migrator("plan") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("sampling")]
    assert line.endswith("in 2 places: set checkpoint_key to state_dict or state_dict_ema")
    world.configure(old_encoder__checkpoint_key="state_dict_ema")
    assert migrator("plan") == 0
    assert "from its weights: state_dict_ema" in capsys.readouterr().out
    assert migrator("plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["old_encoder"]["weights"] == "state_dict_ema"
    world.configure(old_encoder__checkpoint_key="state_dict")
    assert migrator("plan") == 3  # it loads, and the vectors are another's
    assert "were not made by" in capsys.readouterr().err
