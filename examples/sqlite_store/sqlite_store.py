"""Collections in a SQLite database, as a store for migrator.

An application writes items with `INSERT OR REPLACE INTO items (collection, id, vector, payload)`. That leaves the
column `stamp` empty, so that a vector which the application writes during a migration is found again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from migrator.adapters.base import (
    BaseStore,
    Capabilities,
    CollectionInfo,
    Hits,
    ItemId,
    Page,
    Reading,
    StoreBusy,
    StoreRejected,
    StoreUnavailable,
    Vectors,
    WriteReport,
    same_value,
)
from migrator.adapters.iterate import pages, parts
from migrator.adapters.vectors import as_batch, as_queries, contents, unusable

TABLES = """
CREATE TABLE IF NOT EXISTS collections (name TEXT PRIMARY KEY, dim INTEGER NOT NULL, metric TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS aliases (alias TEXT PRIMARY KEY, collection TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    collection TEXT NOT NULL, id NOT NULL, vector BLOB NOT NULL, payload TEXT NOT NULL, stamp TEXT,
    PRIMARY KEY (collection, id)
) WITHOUT ROWID;
"""
"""`id` has no type: integers and texts stay what they are, and sort as migrator expects it."""
IDS = 500  # in one statement


def open_store(config: Mapping[str, Any], *, write: bool) -> SqliteStore:
    """Opens `config["collection"]`, a name or an alias, in the database `config["path"]`."""
    unknown = sorted(set(config) - {"kind", "path", "collection"})
    if unknown or not all(isinstance(config.get(key), str) for key in ("path", "collection")):
        raise StoreRejected(f"a sqlite store has the settings `path` and `collection`; given: {', '.join(config)}")
    return SqliteStore(Path(config["path"]).absolute(), config["collection"], write=write)


class SqliteStore(BaseStore):
    """One collection of a database. For writing it is locked, so that the application is the only other writer."""

    def __init__(self, path: Path, collection: str, *, write: bool) -> None:
        self._path, self._collection, self._write = path, collection, write
        self._alias: str | None = None
        if not path.is_file():
            raise StoreRejected(f"{path} does not exist: correct `path` of the store")
        with self._database() as database:
            leads_to = database.execute("SELECT collection FROM aliases WHERE alias = ?", (collection,)).fetchone()
            if leads_to is not None:
                self._collection, self._alias = leads_to[0], collection
            query = "SELECT dim, metric FROM collections WHERE name = ?"
            found = database.execute(query, (self._collection,)).fetchone()
        if found is None:
            raise StoreRejected(f"{path} has no collection or alias {collection!r}: correct `collection` of the store")
        self._dim, self._metric = found
        self._lock = FileLock(f"{path}.{self._collection}.lock", timeout=0)
        if write:
            try:
                self._lock.acquire()
            except Timeout:
                raise StoreBusy(f"collection {self._collection} of {path} is open for writing elsewhere") from None

    @contextmanager
    def _database(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection within one transaction, which an exception rolls back."""
        self._must_be_open()
        try:
            with closing(sqlite3.connect(self._path, timeout=30)) as database, database:
                if write:
                    database.execute("BEGIN IMMEDIATE")  # what is read from here on stays so until the write
                yield database
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"{self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreRejected(f"{self._path}: {error}") from error

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """Vectors are kept and searched as they are."""
        return Capabilities(
            update_in_place=True,
            visible="at_once",
            stamps=True,
            concurrent_writers=False,
            exact_vectors=True,
            normalises=False,
            partial_update=True,
            aliases=True,
            notes=("an application that updates a vector must set `stamp` to NULL, or the change is not found",),
        )

    def describe(self) -> CollectionInfo:
        """Facts of the collection. The schema is taken from the first payloads."""
        schema: dict[str, str] = {}
        for payload in self.read_payloads(self.scan_ids(after=None, limit=100)).payloads:
            schema.update({name: type(value).__name__ for name, value in payload.items()})
        return CollectionInfo(
            name=f"sqlite:{self._path}/{self._collection}",
            collection_id=self._collection,
            dim=self._dim,
            metric=self._metric,
            count=self.count(),
            index="brute force",
            server=f"sqlite {sqlite3.sqlite_version}",
            schema=schema,
            alias=self._alias,
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def scan_ids(self, *, after: ItemId | None, up_to: ItemId | None = None, limit: int) -> list[ItemId]:
        """The next `limit` ids: integers ascending, then texts by code point."""
        query, values = "SELECT id FROM items WHERE collection = ?", [self._collection]
        for condition, bound in (("id > ?", after), ("id <= ?", up_to)):
            if bound is not None:
                query, values = f"{query} AND {condition}", [*values, bound]
        with self._database() as database:
            return [row[0] for row in database.execute(f"{query} ORDER BY id LIMIT ?", (*values, max(limit, 0)))]

    def _read(self, ids: Sequence[ItemId], *, vectors: bool, payload: bool) -> Reading:
        """The items as they were written last."""
        with self._database() as database:
            page = self._page(database, ids)
        return Reading(page.ids, page.vectors if vectors else None, page.payloads if payload else None, page.stamps)

    def _page(self, database: sqlite3.Connection, ids: Sequence[ItemId]) -> Page:
        rows: dict[ItemId, tuple[Any, ...]] = {}
        for part in parts(ids, IDS):
            marks = ", ".join("?" * len(part))
            query = f"SELECT id, vector, payload, stamp FROM items WHERE collection = ? AND id IN ({marks})"  # noqa: S608
            rows.update({row[0]: row for row in database.execute(query, (self._collection, *part))})
        found = [rows[item] for item in ids if item in rows]
        content = b"".join(vector for _, vector, _, _ in found)
        return Page(
            [item for item, *_ in found],
            np.frombuffer(content, "<f4").astype(np.float32).reshape(len(found), self._dim),
            [json.loads(payload) for _, _, payload, _ in found],
            [stamp for *_, stamp in found],
        )

    def search(self, vectors: Vectors, k: int, *, exact: bool = False) -> Hits:
        """The k nearest items to each of `vectors` (n, dim), all of them compared."""
        queries = as_queries(vectors, self._dim, k)
        ids: list[ItemId] = []
        scores = np.empty((len(queries), 0))
        for page in pages(self):
            ids += page.ids
            scores = np.concatenate([scores, self._scores(queries, page.vectors)], axis=1)
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Hits(
            [[ids[column] for column in row] for row in nearest],
            [scores[row, columns].tolist() for row, columns in enumerate(nearest)],
        )

    def _scores(self, queries: Vectors, vectors: Any) -> Any:
        """(n, dim), (m, dim) -> (n, m)."""
        if self._metric == "l2":
            return -np.square(queries[:, None] - vectors[None]).sum(axis=2)
        if self._metric == "cosine":
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
            queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-30)
        return queries @ vectors.T

    # -- writing --------------------------------------------------------------------------------------------------

    def write_vectors(
        self, ids: Sequence[ItemId], vectors: Vectors, stamp: str | None, expected: Page | None = None
    ) -> WriteReport:
        """Replaces vectors and stamps, and compares with `expected` in the same transaction."""
        self._must_write()
        batch = as_batch(vectors, self._dim, ids)
        rejected = {} if stamp is None else unusable(ids, batch)
        rows = {item: batch[row].astype("<f4").tobytes() for row, item in enumerate(ids)}
        before = None if expected is None else contents(expected)
        with self._database(write=True) as database:
            page = self._page(database, ids)
            now, stamps = contents(page), dict(zip(page.ids, page.stamps, strict=True))
            changed = [
                item
                for item, (vector, payload) in now.items()
                if before is not None
                and not same_value((vector, payload), before.get(item))
                and not (stamps[item] == stamp is not None and vector == rows[item])  # our own write, repeated
            ]
            written = [item for item in ids if item in now and item not in {*changed, *rejected}]
            database.executemany(
                "UPDATE items SET vector = ?, stamp = ? WHERE collection = ? AND id = ?",
                [(rows[item], stamp, self._collection, item) for item in written],
            )
        left = {item: why for item, why in rejected.items() if item not in changed}
        return WriteReport.of(written, [item for item in ids if item not in now], left, changed)

    def insert(self, page: Page) -> WriteReport:
        """Writes whole items."""
        self._must_write()
        vectors = as_batch(page.vectors, self._dim, page.ids)
        rejected = unusable(page.ids, vectors)
        rows = [
            (self._collection, item, vector.astype("<f4").tobytes(), json.dumps(dict(payload)), stamp)
            for item, vector, payload, stamp in zip(page.ids, vectors, page.payloads, page.stamps, strict=True)
            if item not in rejected
        ]
        with self._database(write=True) as database:
            database.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)", rows)
        return WriteReport([item for item in page.ids if item not in rejected], (), rejected)

    def delete(self, ids: Sequence[ItemId]) -> None:
        """Removes these items."""
        self._must_write()
        with self._database(write=True) as database:
            pairs = [(self._collection, item) for item in ids]
            database.executemany("DELETE FROM items WHERE collection = ? AND id = ?", pairs)

    def clear_migration_state(self) -> None:
        """Removes the stamps."""
        self._must_write()
        with self._database(write=True) as database:
            database.execute("UPDATE items SET stamp = NULL WHERE collection = ?", (self._collection,))

    # -- a second collection --------------------------------------------------------------------------------------

    def exists(self, collection_id: str) -> bool:
        """Whether the database has a collection of that name."""
        with self._database() as database:
            found = database.execute("SELECT 1 FROM collections WHERE name = ?", (collection_id,))
            return found.fetchone() is not None

    def open_collection(self, collection_id: str) -> SqliteStore:
        """Another collection of the database."""
        if not self.exists(collection_id):
            raise StoreRejected(f"{self._path} has no collection {collection_id!r}")
        return SqliteStore(self._path, collection_id, write=self._write)

    def create_like(self, collection_id: str, *, dim: int) -> SqliteStore:
        """An empty collection of the same metric; one that exists already is opened if its vectors fit."""
        self._must_write()
        with self._database(write=True) as database:
            row = (collection_id, dim, self._metric)
            database.execute("INSERT OR IGNORE INTO collections VALUES (?, ?, ?)", row)
        store = self.open_collection(collection_id)
        if store._dim != dim:
            store.close()
            raise StoreRejected(f"{collection_id} exists already, with {store._dim}-d vectors: remove it")
        return store

    def check_create_like(self, *, dim: int) -> None:
        """Nothing is refused: a collection has no more settings than its metric."""
        self._must_be_open()

    def swap_alias(self, alias: str, *, to: str) -> None:
        """Moves an alias, in one statement."""
        self._must_write()
        if not self.exists(to):
            raise StoreRejected(f"{self._path} has no collection {to!r} to point {alias!r} at")
        with self._database(write=True) as database:
            moved = database.execute("UPDATE aliases SET collection = ? WHERE alias = ?", (to, alias))
            if moved.rowcount == 0:
                raise StoreRejected(f"{self._path} has no alias {alias!r}")

    def drop(self) -> None:
        """Deletes the collection, unless an alias leads to it."""
        self._must_write()
        with self._database(write=True) as database:
            query = "SELECT alias FROM aliases WHERE collection = ?"
            if alias := database.execute(query, (self._collection,)).fetchone():
                raise StoreRejected(f"{self._collection} is not deleted: the alias {alias[0]!r} leads to it")
            database.execute("DELETE FROM items WHERE collection = ?", (self._collection,))
            database.execute("DELETE FROM collections WHERE name = ?", (self._collection,))
        self.close()

    def close(self) -> None:
        """Releases the lock. Safe to repeat."""
        self._open = False
        self._lock.release()
