"""The packages as they are installed. What may import what is import-linter's to check: `make lint`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from migrator import __version__

ROOT = Path(__file__).parents[2]


LINKED = ("adapters", "trainer")
"""The folders that are imported as packages of `migrator`."""


@pytest.mark.parametrize("name", LINKED)
def test_the_folders_at_the_top_are_packages_of_migrator(name: str) -> None:
    link = ROOT / "migrator" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert importlib.import_module(f"migrator.{name}").__file__ == str(link / "__init__.py")


def test_foreign_packages_of_the_same_names_change_nothing(tmp_path: Path) -> None:
    for name in LINKED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("foreign = True\n")
        (tmp_path / name / "base.py").write_text("raise ImportError('foreign')\n")
        (tmp_path / name / "encoder.py").write_text("raise ImportError('foreign')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import adapters, trainer; assert adapters.foreign and trainer.foreign\n"
        "from migrator.adapters.base import Store\n"
        "from migrator.trainer.encoders.spec import EncoderSpec\n"
        "from importlib.metadata import entry_points\n"
        "stores = entry_points(group='migrator.stores')\n"
        "assert stores and not [store.value for store in stores if not store.value.startswith('migrator.adapters.')]\n"
        "(faiss,) = [store.load() for store in stores if store.name == 'faiss']\n"
        "assert faiss.__module__ == 'migrator.adapters.faiss.store'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_versions_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
