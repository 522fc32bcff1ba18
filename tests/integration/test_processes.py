"""Two processes on the gloo backend train what one does with the same batch: real processes, losses compared."""

import os
import socket
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from migrator.trainer.data.items import read_items
from migrator.trainer.encoders.loading import load_encoder
from migrator.trainer.encoders.spec import EncoderSpec
from migrator.trainer.images.preprocessing import Preprocessing
from migrator.trainer.images.source import ImageSource
from migrator.trainer.training import loop
from migrator.trainer.training.fit import fit, follow
from migrator.trainer.training.progress import Progress
from migrator.trainer.training.settings import FitSettings
from tests.digits import digits_with_old_encoder
from tests.support.forked import forked

# Three convolutional stages with batch norms, some with their activation inside, and our own norm behind them.
SPEC = EncoderSpec("test_efficientnet", 16, Preprocessing(image_size=16))
SETTINGS = FitSettings(epochs=1, batch_size=40, lr=1e-4, device="cpu", image_threads=1, flip=True)
DEADLINE = 120.0


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return forked()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits_with_old_encoder(folder, 240, SPEC)
    return folder


def train(folder: Path, run: str, settings: FitSettings, rank: int, world: int, port: int, there: Connection) -> None:
    """One process; the first sends the losses after each step."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    loop.REPORT_EVERY = 1
    losses: list[dict[str, float]] = []

    def report(progress: Progress) -> None:
        if progress.stage == "train":
            losses.append(dict(progress.losses))

    if rank:
        follow(SPEC, settings, folder / run)
        return
    old = load_encoder(replace(SPEC, weights=folder / "old.safetensors"), device="cpu")
    items, images = read_items(folder / "items.csv"), ImageSource(str(folder))
    fit(items, images, old, SPEC, settings, folder / run, report=report)
    there.send(losses)


def trained(
    context: ForkServerContext, folder: Path, settings: FitSettings, world: int
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The losses of each step (mean so far), and the encoder's weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = context.Pipe(duplex=False)
    run = f"{settings.method}-{world}"
    processes = [
        context.Process(target=train, args=(folder, run, settings, rank, world, port, there)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    there.close()
    try:
        assert here.poll(DEADLINE), "no process has finished"
        losses = here.recv()
        for process in processes:
            process.join(DEADLINE)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return losses, load_file(folder / run / "encoder.safetensors")


@pytest.mark.parametrize(("method", "device"), [("advbct", "cpu"), ("hot_refresh", "auto")])
def test_two_processes_have_the_losses_and_weights_of_one(
    context: ForkServerContext, folder: Path, method: str, device: Literal["auto", "cpu"]
) -> None:
    settings = replace(SETTINGS, method=method, device=device)
    alone, weights = trained(context, folder, settings, 1)
    together, shared_weights = trained(context, folder, settings, 2)
    assert len(together) == len(alone) > 3
    for step, (one, two) in enumerate(zip(alone, together, strict=True)):
        assert two == pytest.approx(one, rel=1e-5 if step == 0 else 1e-3), step
    for name, weight in weights.items():
        np.testing.assert_allclose(shared_weights[name], weight, rtol=0.02, atol=2e-3, err_msg=name)
