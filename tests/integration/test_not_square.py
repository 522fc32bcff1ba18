"""Inputs that are not square: timm's models, programs, ONNX files, training and its augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from migrator.trainer.data.augment import augmented, draw_views
from migrator.trainer.data.items import training_items
from migrator.trainer.encoders.building import build_model
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.saving import save_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.errors import EncoderProblem
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.torchvision_cpu import import_timm
from migrator.trainer.training.fit import fit
from migrator.trainer.training.settings import FitSettings
from tests.unit.test_encoder_sources import WIDTH, onnx_file

SIZE = (32, 48)
TALL = Preprocessing(SIZE, "crop")


def batch(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 3, *SIZE), dtype=np.uint8)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (TALL.mean, TALL.std))
    return (torch.tensor(pixels) / 255 - mean) / std


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_a_model_of_timm(tmp_path: Path, arch: str) -> None:
    options: dict[str, Any] = {"img_size": SIZE} if arch == "test_vit" else {}
    model = import_timm().create_model(arch, num_classes=0, **options).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    spec = EncoderSpec(arch, model.num_features, TALL, tmp_path / "w.pt")
    with torch.no_grad():
        expected = nn.functional.normalize(model(normalised(batch()))).numpy()
    encoder = load_encoder(spec)
    assert np.abs(encoder.encode(batch()) - expected).max() < 1e-5
    assert encoder.id != load_encoder(replace(spec, preprocessing=Preprocessing(SIZE))).id
    with pytest.raises(EncoderProblem, match=r"takes uint8 \(n, 3, 32, 48\)"):
        encoder.encode(batch().swapaxes(2, 3))


def test_a_model_that_cannot_take_it_says_so() -> None:
    with pytest.raises(EncoderProblem, match=r"32 x 40 pixels|cannot be built"):
        build_model(EncoderSpec("test_vit", 8, Preprocessing((32, 40))))


def test_an_exported_program(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 6)).eval()
    program = torch.export.export(
        model, (torch.randn(2, 3, *SIZE),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    spec = EncoderSpec("file:pt2", 6, TALL, tmp_path / "m.pt2")
    with torch.no_grad():
        expected = nn.functional.normalize(model(normalised(batch()))).numpy()
    assert np.abs(load_encoder(spec).encode(batch()) - expected).max() < 1e-5
    for other in (SIZE[::-1], 32, 48):
        with pytest.raises(EncoderProblem, match=r"takes an input of shape \(n, 3, 32, 48\)"):
            load_encoder(replace(spec, preprocessing=Preprocessing(other)))


def test_an_onnx_model(tmp_path: Path) -> None:
    matrix = onnx_file(tmp_path / "m.onnx", size=SIZE)
    encoder = load_encoder(EncoderSpec("file:onnx", WIDTH, TALL, tmp_path / "m.onnx"))
    expected = normalised(batch()).mean(dim=(2, 3)).numpy() @ matrix
    assert np.abs(encoder.encode(batch()) - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() < 1e-5


def test_training_reads_prepares_and_augments_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(48)]
    for number, name in enumerate(names):
        pixels = rng.integers(0, 60, (40, 70, 3), np.uint8)
        pixels[:, 20 * (number % 3) : 20 * (number % 3) + 20] += 150
        Image.fromarray(pixels).save(tmp_path / name)
    items = training_items(names, [str(number % 3) for number in range(48)], source="stripes")
    spec = EncoderSpec("test_vit", 8, TALL)
    old = load_encoder(replace(spec, weights=_saved(spec, tmp_path / "old.safetensors")), device="cpu")
    settings = FitSettings(epochs=1, batch_size=8, device="cpu", image_threads=2, flip=True, validation=0.2)
    result = fit(items, ImageSource(str(tmp_path)), old, spec, settings, tmp_path / "run")
    assert result.manifest.preprocessing == TALL
    new = load_encoder(replace(spec, weights=result.weights), expected=result.manifest, device="cpu")
    assert new.encode(new.prepare(Image.open(tmp_path / names[0]))[None]).shape == (1, 8)


def _saved(spec: EncoderSpec, path: Path) -> Path:
    save_encoder(build_model(spec), spec, path)
    return path


def test_shifts_reach_an_eighth_of_each_side() -> None:
    views = draw_views(500, SIZE, flip=False, generator=torch.Generator().manual_seed(0))
    assert views.shift[0].unique().tolist() == list(range(-4, 5))
    assert views.shift[1].unique().tolist() == list(range(-6, 7))
    image = torch.arange(32 * 48).reshape(1, 1, 32, 48).expand(500, 3, -1, -1)
    seen = augmented(image, views)
    rows, columns = torch.arange(32), torch.arange(48)
    for picture, (down, right) in zip(seen[:20], views.shift.T.tolist()[:20], strict=True):
        torch.testing.assert_close(
            picture[0], image[0, 0][(rows + down).clamp(0, 31)][:, (columns + right).clamp(0, 47)]
        )


def test_runs_of_square_inputs_draw_the_shifts_that_they_drew_before() -> None:
    """Both sides in one call: a run that is resumed has to see the same views."""
    for count in (1, 7, 128, 1000):
        before = torch.randint(-4, 5, (2, count), generator=torch.Generator().manual_seed(count))
        now = draw_views(count, (32, 32), flip=False, generator=torch.Generator().manual_seed(count))
        assert torch.equal(now.shift, before)
