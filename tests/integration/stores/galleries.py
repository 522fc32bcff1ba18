"""FAISS galleries, made and changed as their owners do: with FAISS and Arrow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adapters.base import ItemId, Store, Vectors
from adapters.registry import open_store
from tests.integration.stores.contract import Collection


@dataclass(frozen=True)
class Flavour:
    """A kind of index and of ids."""

    factory: str
    metric: int = faiss.METRIC_INNER_PRODUCT
    strings: bool = False
    faiss_ids: bool = False
    """The items table names the FAISS ids in a column of its own."""

    @property
    def id_map(self) -> bool:
        return self.factory.startswith("IDMap")

    def __str__(self) -> str:
        words = [self.factory, "L2" if self.metric == faiss.METRIC_L2 else ""]
        return "-".join(word for word in [*words, "str" * self.strings, "faiss_id" * self.faiss_ids] if word)


@dataclass
class Gallery(Collection):
    """A folder with index.faiss and items.parquet."""

    path: Path
    flavour: Flavour

    def open(self, *, write: bool = True) -> Store:
        return open_store({"kind": "faiss", "path": str(self.path)}, write=write)

    @property
    def index_file(self) -> Path:
        return self.path / "index.faiss"

    @property
    def items_file(self) -> Path:
        return self.path / "items.parquet"

    def fill(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Builds both files, and puts them in place by renames."""
        self.path.mkdir(parents=True, exist_ok=True)
        labels = self._labels(ids)
        self._put_index(build_index(self.flavour, vectors, labels))
        kind = pa.string() if self.flavour.strings else pa.int64()
        columns: dict[str, Any] = {"id": pa.array(ids, kind)}
        if self.flavour.faiss_ids:
            columns["faiss_id"] = pa.array(labels)
        columns["path"] = pa.array([payload["path"] for payload in payloads], pa.string())
        columns["price"] = pa.array([payload["price"] for payload in payloads], pa.float64())
        temporary = self.path / "items.new"
        pq.write_table(pa.table(columns), temporary)
        temporary.replace(self.items_file)

    def _labels(self, ids: Sequence[ItemId]) -> np.ndarray:
        if self.flavour.faiss_ids:
            return 1000 + 3 * np.random.default_rng(5).permutation(len(ids))
        return np.array(ids, np.int64) if self.flavour.id_map else np.arange(len(ids))

    def _put_index(self, index: Any) -> None:
        temporary = self.path / "index.new"
        faiss.write_index(index, str(temporary))
        temporary.replace(self.index_file)

    def content(self) -> tuple[list[ItemId], Vectors, list[dict[str, Any]]]:
        """Ids, vectors and payloads as both files hold them now."""
        rows = pq.ParquetFile(self.items_file).read().to_pylist()
        ids = [row.pop("id") for row in rows]
        labels = [row.pop("faiss_id") for row in rows] if self.flavour.faiss_ids else self._labels(ids)
        by_label = vectors_by_label(faiss.read_index(str(self.index_file)))
        dim = len(next(iter(by_label.values()))) if by_label else 0
        vectors = np.array([by_label[int(label)] for label in labels], np.float32).reshape(len(ids), dim)
        return ids, vectors, rows

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        index = faiss.read_index(str(self.index_file))
        present, _, _ = self.content()
        labels = self._labels(present)
        put_vectors(index, [int(labels[present.index(item)]) for item in ids], vectors)
        self._put_index(index)

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[Mapping[str, Any]]) -> None:
        present, old, rows = self.content()
        self._refill([*present, *ids], np.concatenate([old, vectors]), [*rows, *map(dict, payloads)])

    def delete(self, ids: Sequence[ItemId]) -> None:
        present, old, rows = self.content()
        keep = [row for row, item in enumerate(present) if item not in ids]
        self._refill([present[row] for row in keep], old[keep], [rows[row] for row in keep])

    def _refill(self, ids: list[ItemId], vectors: Vectors, payloads: list[dict[str, Any]]) -> None:
        """Builds the index anew over vectors that it learnt nothing from, so that the others come out as they were."""
        index = faiss.read_index(str(self.index_file))
        add(index, vectors, self._labels(ids), afresh=True)
        trained, self._trained = getattr(self, "_trained", None), index
        try:
            self.fill(ids, vectors, payloads)
            self._put_index(index)
        finally:
            self._trained = trained

    def visible(self) -> dict[ItemId, np.ndarray]:
        ids, vectors, _ = self.content()
        return dict(zip(ids, vectors, strict=True))


def build_index(flavour: Flavour, vectors: Vectors, labels: np.ndarray) -> Any:
    """A trained index with `vectors` under `labels`."""
    index = faiss.index_factory(vectors.shape[1], flavour.factory, flavour.metric)
    if not index.is_trained:
        # Few vectors must do; more are made up where FAISS insists on them.
        more = np.random.default_rng(1).standard_normal((max(0, 700 - len(vectors)), vectors.shape[1]))
        index.train(np.concatenate([vectors, more.astype(np.float32)]))
    add(index, vectors, labels, afresh=False)
    return index


def add(index: Any, vectors: Vectors, labels: np.ndarray, *, afresh: bool) -> None:
    """Fills an index, through an ID map or a list's own ids where it has them."""
    if afresh:
        index.reset()
    inner = faiss.downcast_index(index)
    if isinstance(inner, (faiss.IndexIDMap, faiss.IndexIDMap2)) or (
        isinstance(inner, faiss.IndexIVF) and not np.array_equal(labels, np.arange(len(labels)))
    ):
        inner.add_with_ids(vectors, labels)
    else:
        inner.add(vectors)


def vectors_by_label(index: Any) -> dict[int, np.ndarray]:
    """What an index holds, read the plain way."""
    outer = faiss.downcast_index(index)
    inner = outer
    labels = list(range(index.ntotal))
    if isinstance(outer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        labels = faiss.vector_to_array(outer.id_map).tolist()
        inner = faiss.downcast_index(outer.index)
    elif isinstance(outer, faiss.IndexIVF):
        outer.set_direct_map_type(faiss.DirectMap.Hashtable)
        lists = outer.invlists
        sizes = [lists.list_size(number) for number in range(outer.nlist)]
        parts = [faiss.rev_swig_ptr(lists.get_ids(number), size).tolist() for number, size in enumerate(sizes) if size]
        return {label: outer.reconstruct(label) for part in parts for label in part}
    return dict(zip(labels, inner.reconstruct_n(0, index.ntotal), strict=True)) if labels else {}


def put_vectors(index: Any, labels: Sequence[int], vectors: Vectors) -> None:
    """Replaces single vectors by building the index again with what it has learnt; the others keep their codes."""
    present = vectors_by_label(index)
    for label, vector in zip(labels, vectors, strict=True):
        assert label in present
        present[label] = vector
    order = list(present)
    add(index, np.array([present[label] for label in order], np.float32), np.array(order), afresh=True)
