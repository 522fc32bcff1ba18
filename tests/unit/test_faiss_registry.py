"""Which adapter a configuration gets, and what one is told who gets none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from migrator.adapters.base import StoreRejected
from migrator.adapters.registry import known_kinds, open_store


@pytest.mark.parametrize(
    ("kind", "words"),
    [("fais", "did you mean 'faiss'"), ("oracle", "known are .*faiss"), (None, "kind None"), (7, "kind 7")],
)
def test_an_unknown_kind_names_the_known_ones(kind: object, words: str) -> None:
    with pytest.raises(StoreRejected, match=words) as refusal:
        open_store({"kind": kind}, write=False)
    assert "\n" not in str(refusal.value)


def test_a_library_that_is_missing_comes_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("index.faiss", "items.parquet"):
        (tmp_path / name).touch()
    monkeypatch.setattr("migrator.adapters.faiss.folder.Folder.read_items", lambda _: None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StoreRejected, match=r"needs the library faiss: pip install 'advbct-migrator\[faiss\]'"):
        open_store({"kind": "faiss", "path": str(tmp_path)}, write=False)


def test_other_packages_join_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toystore.py").write_text(
        "def open_store(config, *, write):\n"
        "    if config['broken']:\n"
        "        import toyclient\n"
        "    return config, write\n"
    )
    info = tmp_path / "toystore-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toystore\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[migrator.stores]\ntoy = toystore:open_store\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"faiss", "toy"} <= set(known_kinds())
    config = {"kind": "toy", "broken": False}
    store: Any = open_store(config, write=True)
    assert store == (config, True)
    with pytest.raises(StoreRejected, match="needs the library toyclient: install toyclient"):
        open_store({"kind": "toy", "broken": True}, write=True)


def test_the_adapters_are_cheap_to_import() -> None:
    code = (
        "import sys, migrator.adapters.registry, migrator.adapters.faiss\n"
        "print(sorted({'faiss', 'pyarrow', 'torch', 'filelock'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
