"""The example of a store from another package: under its own test, and found by its entry point."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path

import pytest

from migrator.adapters.registry import open_store

EXAMPLE = Path(__file__).parents[3] / "examples" / "sqlite_store"


def test_it_meets_the_contract(tmp_path: Path) -> None:
    """As its author runs it: outside this repository."""
    shutil.copytree(EXAMPLE, tmp_path / "sqlite_store", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", ".", "."]
    done = subprocess.run(command, cwd=tmp_path / "sqlite_store", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_it_joins_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["migrator.stores"].items()
    info = tmp_path / "sqlite_store-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[migrator.stores]\n{' = '.join(entry)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLE)
    import sqlite_store  # type: ignore[import-not-found]

    with closing(sqlite3.connect(tmp_path / "toys.db")) as database, database:
        database.executescript(sqlite_store.TABLES)
        database.execute("INSERT INTO collections VALUES ('toys', 8, 'ip')")
    config = {"kind": "sqlite", "path": str(tmp_path / "toys.db"), "collection": "toys"}
    with closing(open_store(config, write=True)) as store:
        assert (store.describe().dim, store.describe().metric, store.count()) == (8, "ip", 0)
