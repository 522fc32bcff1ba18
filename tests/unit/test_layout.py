"""The house rules that a reader of the code relies on."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path

from migrator import __version__, demo
from migrator.config import load_config
from migrator.demo_stores import STORES

ROOT = Path(__file__).parents[2]


def imports_of(file: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_arrows_only_run_down() -> None:
    allowed = {"trainer": {"trainer"}, "adapters": {"adapters"}, "migrator": {"migrator", "adapters", "trainer"}}
    for package, may in allowed.items():
        for file in (ROOT / package).rglob("*.py"):
            ours = imports_of(file) & set(allowed)
            assert ours <= may, f"{file} imports {ours - may}"


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


def test_the_numbers_in_the_readme_are_those_of_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    measured = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())["demo"]["quality"]
    for row in measured:
        shown = f"| {row['what']} | {row['metrics']['map@100']:.4f} | {row['metrics']['recall@1']:.4f} |"
        assert shown in readme
    results = json.loads((ROOT / "bench" / "results" / "backfill.json").read_text())
    assert f"| {results['pipeline']['median_ratio']:.2f} |" in readme
    for row in results["engine"]:
        assert f"| {row['median_vectors_per_second']:,} |" in readme
