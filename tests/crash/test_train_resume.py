"""A training killed at random moments and resumed ends with the weights of an uninterrupted one, bit for bit."""

import random
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from migrator.trainer.data.items import read_items
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.training import loop
from migrator.trainer.training.fit import fit
from migrator.trainer.training.progress import Progress
from migrator.trainer.training.settings import FitSettings
from tests.digits import digits_with_old_encoder
from tests.support.forked import forked

pytestmark = pytest.mark.crash

SPEC = EncoderSpec("test_resnet", 16, Preprocessing(image_size=16))
KILLS = 3


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return forked()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits_with_old_encoder(folder, 300, SPEC)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(folder: Path, run: str, reports: Connection | None = None) -> None:
    torch.set_num_threads(1)
    loop.REPORT_EVERY = 3
    old = load_encoder(replace(SPEC, weights=folder / "old.safetensors"), device="cpu")

    def report(progress: Progress) -> None:
        if reports is not None:
            reports.send(progress.stage)

    # A checkpoint after every step.
    settings = FitSettings(epochs=3, batch_size=20, device="cpu", image_threads=2, checkpoint_minutes=1e-9)
    items, images = read_items(folder / "items.csv"), ImageSource(str(folder))
    fit(items, images, old, SPEC, settings, folder / run, report=report)


def train_and_kill(context: ForkServerContext, folder: Path, *, stage: str, after: int) -> None:
    """Kills the training when it has reported the stage so often."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(folder, "parts", there))
    process.start()
    there.close()
    seen = 0
    with here:
        while seen < after:
            assert here.poll(120), "the training reports no more"
            seen += here.recv() == stage
        process.kill()
    process.join()
    assert process.exitcode == -9


def test_killed_training_resumes_bit_for_bit(folder: Path, context: ForkServerContext) -> None:
    dice = random.Random(4)
    train_and_kill(context, folder, stage="images", after=1)
    train_and_kill(context, folder, stage="old vectors", after=4)
    for _ in range(KILLS):  # a report is a step, of some forty
        train_and_kill(context, folder, stage="train", after=dice.randint(3, 10))
    within = [path for path in (folder / "parts").glob("checkpoint-*.pt") if path.stem.count("-") == 2]
    assert within, "no kill left a checkpoint within an epoch"
    assert not (folder / "parts" / "result.json").exists()
    for run in ("parts", "whole"):
        train(folder, run)
    whole, parts = (load_file(folder / run / "encoder.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert tensor.tobytes() == parts[name].tobytes(), name
    assert (folder / "whole" / "encoder.json").read_bytes() == (folder / "parts" / "encoder.json").read_bytes()
