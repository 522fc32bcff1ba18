"""The house rules that a reader of the code relies on."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from migrator import __version__, demo
from migrator.config import load_config
from migrator.demo_stores import STORES

ROOT = Path(__file__).parents[2]


LINKED = ("adapters", "trainer")
"""The folders that are imported as packages of `migrator`."""


def imports_of(file: Path) -> set[str]:
    """Packages that a file imports, anywhere in it: `migrator.adapters`, `migrator.trainer`, others by first name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {_package(name.name) for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {_package(f"{node.module}.{name.name}") for name in node.names}
    return found


def _package(module: str) -> str:
    first, second, *_ = *module.split("."), ""
    return f"{first}.{second}" if first == "migrator" and second in (*LINKED, "errors") else first


def test_arrows_only_run_down() -> None:
    own = {"migrator", "migrator.errors", *LINKED, *(f"migrator.{name}" for name in LINKED)}
    allowed = {
        "trainer": {"migrator.trainer", "migrator.errors"},
        "adapters": {"migrator.adapters", "migrator.errors"},
        "migrator": {"migrator", "migrator.errors", "migrator.adapters", "migrator.trainer"},
    }
    for package, may in allowed.items():
        files = list((ROOT / package).rglob("*.py"))
        assert files
        for file in files:
            ours = imports_of(file) & own
            assert ours <= may, f"{file} imports {ours - may}"


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


def test_only_the_ledger_speaks_sql() -> None:
    for file in (ROOT / "migrator").rglob("*.py"):
        if "ledger" not in file.parts:
            assert not imports_of(file) & {"sqlalchemy", "alembic"}, file


def test_the_versions_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_the_example_at_the_root_is_the_demo_seen_from_above(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "migrations.yaml").write_text(
        demo.CONFIG.format(
            name=demo.NAME, store=STORES["faiss"].settings, dim=demo.DIM, size=demo.SIZE, queries=demo.QUERIES
        )
    )
    (tmp_path / "migrations.yaml").write_text((ROOT / "migrations.yaml").read_text())
    assert load_config(tmp_path / "migrations.yaml").redacted() == load_config(folder / "migrations.yaml").redacted()


def test_the_numbers_in_the_benchmarks_are_those_of_the_committed_results() -> None:
    page = (ROOT / "docs" / "explanation" / "benchmarks.md").read_text()
    measured = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())["demo"]["quality"]
    for row in measured:
        shown = f"| {row['what']} | {row['metrics']['map@100']:.4f} | {row['metrics']['recall@1']:.4f} |"
        assert shown in page
    results = json.loads((ROOT / "bench" / "results" / "backfill.json").read_text())
    assert f"| {results['pipeline']['median_ratio']:.2f} |" in page
    for row in results["engine"]:
        assert f"| {row['median_vectors_per_second']:,} |" in page
