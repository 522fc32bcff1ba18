"""Encoders whose factories bring their own transform: from the plan through training to the backfill and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.world import DIM, NAME, World, write_gallery

ITEMS = 60
HEIGHT, WIDTH = 12, 20
LOADER = f"""
import torch
from torch import nn
from torchvision import transforms

def padded(image):
    "What no key declares: grey on two sides."
    whole = transforms.functional.pad(image, [3, 0], fill=90)
    tensor = transforms.functional.to_tensor(whole.resize(({WIDTH}, {HEIGHT})))
    return (tensor - 0.4) / 0.2

def transform():
    return padded

def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 9, {DIM}))

def old():
    return network(1), padded

def new():
    return network(2)
"""


@pytest.fixture
def loader(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A gallery that the application's own code made of upright, sideways and transparent files, and its new model."""
    (world.folder / "application_loader.py").write_text(LOADER)
    monkeypatch.setattr(sys, "path", [str(world.folder), *sys.path])
    monkeypatch.delitem(sys.modules, "application_loader", raising=False)
    rng = np.random.default_rng(0)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    names = [f"{number:05d}.png" for number in range(ITEMS)]
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, (14 + number % 5, 20, 4 if number % 3 == 0 else 3), np.uint8)
        Image.fromarray(pixels).save(world.images / name, exif=sideways if number % 4 == 0 else None)
    document = yaml.safe_load(world.config.read_text())
    settings = document["migrations"][NAME]
    settings["old_encoder"] = {"module": "application_loader:old", "dim": DIM}
    settings["new_encoder"] = {
        "module": "application_loader:new",
        "dim": DIM,
        "transform": "application_loader:transform",
    }
    settings["train"] = {"items": {"from": "store", "label": "{kind}"}, "epochs": 1, "batch_size": 16}
    world.config.write_text(yaml.safe_dump(document))
    return world


def by_the_application(world: World, names: list[str]) -> np.ndarray:
    """The stored vectors as the application makes them, without migrator."""
    import torch

    from migrator.trainer.torchvision_cpu import import_torchvision

    import_torchvision()
    import application_loader  # type: ignore[import-not-found]

    model, transform = application_loader.old()
    pictures = [transform(Image.open(world.images / name).convert("RGB")) for name in names]
    with torch.no_grad():
        return torch.nn.functional.normalize(model(torch.stack(pictures))).numpy()


def test_from_plan_to_rollback(loader: World, migrator: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    import faiss

    from migrator.project import Project

    names = [f"{number:05d}.png" for number in range(ITEMS)]
    old = by_the_application(loader, names)
    write_gallery(loader, list(range(ITEMS)), names)
    index = faiss.IndexFlatIP(DIM)
    index.add(old)
    faiss.write_index(index, str(loader.gallery / "index.faiss"))

    assert migrator("plan") == 0, capsys.readouterr().err
    assert "1.00" in capsys.readouterr().out
    assert migrator("train") == 0, capsys.readouterr().err
    assert migrator("verify") == 0, capsys.readouterr().err
    for stage in ("prepare", "canary", "backfill"):
        assert migrator("rollout", "--stage", stage) == 0, capsys.readouterr().err
    assert migrator("backfill") == 0, capsys.readouterr().err
    assert migrator("rollout", "--stage", "cutover") == 0, capsys.readouterr().err

    with Project.open(loader.config) as project:
        encoder = project.new_encoder()
        assert encoder.manifest.preprocessing.transform == "application_loader:transform"
        assert encoder.manifest.preprocessing.size == (HEIGHT, WIDTH)
        batch = np.stack([encoder.prepare(Image.open(loader.images / name)) for name in names])
    import application_loader

    expected = [application_loader.padded(Image.open(loader.images / name).convert("RGB")).numpy() for name in names]
    assert np.array_equal(batch, np.stack(expected)), "an application prepares its pictures as the backfill does"
    assert np.abs(loader.vectors() - encoder.encode(batch)).max() < 1e-5
    assert migrator("rollback") == 0, capsys.readouterr().err
    assert np.array_equal(loader.vectors(), old)


def test_a_module_without_transform_and_size_is_refused_by_plan(
    loader: World, migrator: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    loader.configure(old_encoder={"module": "application_loader:new", "dim": DIM})
    assert migrator("plan") == 2
    assert "returns a Sequential without a transform: give image_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"transform": "application_loader:transform", "resize": "crop"},
            "resize: is a matter of the transform: remove it",
        ),
        (
            {"module": None, "arch": "resnet18", "weights": "w.pt", "preprocessing": "timm", "transform": "a:b"},
            "transform: excludes preprocessing",
        ),
        ({"transform": "application_loader"}, "transform: must be package.module:factory"),
        ({"mean": [0, 0, 0]}, "mean: needs image_size; without both, module returns"),
        ({"image_size": 16, "convert": "none"}, "convert: none leaves the picture's mode to a transform"),
        ({"image_size": 16, "alpha": None}, "alpha: is empty: a # begins a comment"),
        ({"image_size": 16, "alpha": "#fff"}, "alpha: must be white, black, drop or a colour"),
        ({"image_size": 16, "alpha": "black", "convert": "pil"}, "alpha: is not used with convert: pil"),
        ({"image_size": 16, "fill": "white"}, "fill: is not used: it pads with resize: letterbox"),
        ({"image_size": 16, "resize": "letterbox", "fill": "grey"}, "fill: must be white, black or a colour"),
        ({"image_size": 16, "interpolation": "lanczos", "antialias": False}, "antialias: must be true with"),
        ({"image_size": [16]}, r"image_size: must be a whole number from 8 to 4096, or two of them, [height, width]"),
        ({"image_size": [16, 4]}, "image_size: must be a whole number"),
        ({"image_size": True}, "image_size: must not be true or false"),
        ({"image_size": [16, 16.5]}, "image_size: must be a whole number"),
        ({"image_size": 16, "crop_pct": 2.5}, "crop_pct: must be less than or equal to 2"),
        ({"image_size": 16, "exif": "no"}, "exif: must be 'apply' or 'ignore'"),
    ],
)
def test_keys_that_exclude_each_other_are_refused_with_the_file(
    loader: World, migrator: Callable[..., int], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    loader.configure(old_encoder={"module": "application_loader:new", "dim": DIM, **changes})
    assert migrator("plan") == 2
    assert f"migrations.{NAME}.old_encoder.{said}" in capsys.readouterr().err
