"""A training killed at random moments and resumed ends with the weights of an uninterrupted one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

pytestmark = pytest.mark.crash

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from trainer.data import read_items
from trainer.encoder import EncoderSpec, Preprocessing, load_encoder
from trainer.fit import FitSettings, fit
from trainer.images import ImageSource

torch.set_num_threads(1)
folder, run, compatible = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "advbct"
spec = EncoderSpec("test_resnet", 16, Preprocessing(image_size=16))
old = load_encoder(replace(spec, weights=folder / "old" / "encoder.safetensors")) if compatible else None
settings = FitSettings(method=sys.argv[3], epochs=6, batch_size=10, device="cpu", num_workers=2)

def report(progress):
    print(progress.stage, progress.epoch, progress.step, flush=True)

fit(read_items(folder / "items.csv"), ImageSource(str(folder)), old, spec, settings, run, resume=True, report=report)
print("finished", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with their list of items, and an old encoder."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    lines = ["path,label"]
    for number, (image, label) in enumerate(zip(data.images[:300], data.target[:300], strict=True)):
        PIL.Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{label}")
    (folder / "items.csv").write_text("\n".join(lines))
    train(folder, "old", "independent")
    return folder


def train(folder: Path, run: str, method: str, *, kill_after: int | None = None) -> str:
    """Runs the program to its end, or kills it after so many lines of its output. Returns the last line read."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(folder / run), method],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = ""
    assert process.stdout is not None
    with process.stdout:
        for number, line in enumerate(process.stdout, start=1):
            last = line.strip()
            if number == kill_after:
                process.send_signal(signal.SIGKILL)
                break
    code = process.wait(timeout=60)
    assert code == (-signal.SIGKILL if kill_after else 0) or (kill_after and last == "finished")
    return last


def test_killed_training_resumes_bit_for_bit(folder: Path) -> None:
    assert train(folder, "whole", "advbct") == "finished"
    dice = random.Random(4)
    # The first kill falls into the reading of images, the others shortly before, in or after the writing of a checkpoint.
    reached = [
        train(folder, "parts", "advbct", kill_after=lines) for lines in (1, *(dice.randint(1, 4) for _ in range(4)))
    ]
    assert reached[0].startswith("images")
    assert any(line.startswith("train") for line in reached)
    assert train(folder, "parts", "advbct") == "finished"
    whole, parts = (load_file(folder / run / "encoder.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert tensor.tobytes() == parts[name].tobytes(), name
    assert (folder / "whole" / "encoder.json").read_bytes() == (folder / "parts" / "encoder.json").read_bytes()
