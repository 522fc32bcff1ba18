"""The SQLite store under the contract of all stores."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlite_store import TABLES, open_store

from migrator.adapters.base import ItemId, Store, Vectors
from migrator.adapters.testing import DIM, Collection, Make, StoreContract


class Table(Collection):
    """A collection that its application writes with SQL."""

    def __init__(self, path: Path, name: str, metric: str) -> None:
        self.path, self.name, self.alias = path, name, None
        with closing(sqlite3.connect(path)) as database, database:
            database.executescript(TABLES)
        self._write("INSERT INTO collections VALUES (?, ?, ?)", [(name, DIM, metric)])

    def _write(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        with closing(sqlite3.connect(self.path, timeout=30)) as database, database:
            database.executemany(statement, rows)

    def _query(self, query: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self.path, timeout=30)) as database:
            return database.execute(query, values).fetchall()

    def open(self, *, write: bool = True) -> Store:
        config = {"kind": "sqlite", "path": str(self.path), "collection": self.alias or self.name}
        return open_store(config, write=write)

    def add_alias(self) -> str:
        self.alias = f"{self.name}_alias"
        self._write("INSERT INTO aliases VALUES (?, ?)", [(self.alias, self.name)])
        return self.alias

    def alias_leads_to(self) -> str:
        return self._query("SELECT collection FROM aliases WHERE alias = ?", self.alias)[0][0]

    def all_names(self) -> set[str]:
        return {name for (name,) in self._query("SELECT name FROM collections")}

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> None:
        rows = [
            (self.name, item, vector.tobytes(), json.dumps(payload))
            for item, vector, payload in zip(ids, vectors, payloads, strict=True)
        ]
        self._write("INSERT OR REPLACE INTO items (collection, id, vector, payload) VALUES (?, ?, ?, ?)", rows)

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        rows = [(vector.tobytes(), self.name, item) for item, vector in zip(ids, vectors, strict=True)]
        self._write("UPDATE items SET vector = ?, stamp = NULL WHERE collection = ? AND id = ?", rows)

    def delete(self, ids: Sequence[ItemId]) -> None:
        self._write("DELETE FROM items WHERE collection = ? AND id = ?", [(self.name, item) for item in ids])

    def visible(self) -> dict[ItemId, np.ndarray]:
        rows = self._query("SELECT id, vector FROM items WHERE collection = ?", self.name)
        return {item: np.frombuffer(vector, np.float32) for item, vector in rows}


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
class TestSqliteStore(StoreContract):
    @pytest.fixture
    def make(self, tmp_path: Path, metric: str) -> Make:
        names = (f"products_{number}" for number in itertools.count())

        def make(ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[dict[str, Any]]) -> Table:
            table = Table(tmp_path / "products.db", next(names), metric)
            table.insert(ids, vectors, payloads)
            return table

        return make
