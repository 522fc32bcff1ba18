"""FAISS galleries, made and changed as their owners do: with FAISS and Arrow alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from migrator.adapters.base import ItemId, Store, Vectors
from migrator.adapters.registry import open_store
from migrator.adapters.testing import Collection


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
    link: Path | None = None

    def open(self, *, write: bool = True) -> Store:
        return open_store({"kind": "faiss", "path": str(self.link or self.path)}, write=write)

    def add_alias(self) -> str:
        self.link = self.path.with_name("current")
        self.link.symlink_to(self.path)
        return str(self.link)

    def alias_leads_to(self) -> str:
        assert self.link is not None
        return str(self.link.resolve())

    def all_names(self) -> set[str]:
        return {file.name for folder in (self.path.parent, self.path) for file in folder.iterdir()}

    @property
    def index_file(self) -> Path:
        return self.path / "index.faiss"

    @property
    def items_file(self) -> Path:
        return self.path / "items.parquet"

    def fill(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Makes the folder, with an index trained on these vectors."""
        self.path.mkdir(parents=True, exist_ok=True)
        labels = self._labels(ids, [1000 + 3 * int(n) for n in np.random.default_rng(5).permutation(len(ids))])
        self._put(new_index(self.flavour, vectors), ids, labels, vectors, payloads)

    def _labels(self, ids: Sequence[ItemId], column: list[int]) -> list[int]:
        if self.flavour.faiss_ids:
            return column
        return [int(item) for item in ids] if self.flavour.id_map else list(range(len(ids)))

    def _put(
        self,
        index: Any,
        ids: Sequence[ItemId],
        labels: list[int],
        vectors: Vectors,
        payloads: Sequence[Mapping[str, Any]],
    ) -> None:
        hold(index, dict(zip(labels, vectors, strict=True)))
        temporary = self.path / "index.new"
        faiss.write_index(index, str(temporary))
        temporary.replace(self.index_file)
        columns: dict[str, Any] = {"id": pa.array(ids, pa.string() if self.flavour.strings else pa.int64())}
        if self.flavour.faiss_ids:
            columns["faiss_id"] = pa.array(labels, pa.int64())
        columns["path"] = pa.array([payload["path"] for payload in payloads], pa.string())
        columns["price"] = pa.array([payload["price"] for payload in payloads], pa.float64())
        temporary = self.path / "items.new"
        pq.write_table(pa.table(columns), temporary)
        temporary.replace(self.items_file)

    def content(self) -> tuple[Any, list[ItemId], list[int], Vectors, list[dict[str, Any]]]:
        """The index, and ids, FAISS ids, vectors and payloads row by row, as both files have them now."""
        index = faiss.read_index(str(self.index_file))
        rows = pq.ParquetFile(self.items_file).read().to_pylist()
        ids = [row.pop("id") for row in rows]
        labels = self._labels(ids, [row.pop("faiss_id", -1) for row in rows])
        held = vectors_by_label(index)
        vectors = np.array([held[label] for label in labels], np.float32).reshape(len(ids), index.d)
        return index, ids, labels, vectors, rows

    def replace(self, ids: Sequence[ItemId], vectors: Vectors) -> None:
        index, present, labels, old, rows = self.content()
        old[[present.index(item) for item in ids]] = vectors
        self._put(index, present, labels, old, rows)

    def insert(self, ids: Sequence[ItemId], vectors: Vectors, payloads: Sequence[Mapping[str, Any]]) -> None:
        index, present, labels, old, rows = self.content()
        present += ids
        labels = self._labels(present, [*labels, *range(max(labels) + 1, max(labels) + 1 + len(ids))])
        self._put(index, present, labels, np.concatenate([old, vectors]), [*rows, *payloads])

    def delete(self, ids: Sequence[ItemId]) -> None:
        index, present, labels, old, rows = self.content()
        keep = [row for row, item in enumerate(present) if item not in ids]
        present = [present[row] for row in keep]
        labels = self._labels(present, [labels[row] for row in keep])
        self._put(index, present, labels, old[keep], [rows[row] for row in keep])

    def visible(self) -> dict[ItemId, np.ndarray]:
        _, ids, _, vectors, _ = self.content()
        return dict(zip(ids, vectors, strict=True))


FEW = 100
"""Of fewer vectors an index is trained on made-up ones alone: so one training serves galleries of any such size."""


def new_index(flavour: Flavour, vectors: Vectors) -> Any:
    """An empty index, trained on `vectors`; more are made up where FAISS insists on more."""
    known = vectors if len(vectors) >= FEW else vectors[:0]
    return faiss.deserialize_index(_trained(flavour.factory, flavour.metric, vectors.shape[1], known.tobytes()))


@functools.cache
def _trained(factory: str, metric: int, dim: int, content: bytes) -> Any:
    """The index as FAISS serialises it: most galleries of a test run are trained on the same vectors."""
    vectors = np.frombuffer(content, np.float32).reshape(-1, dim)
    index = faiss.index_factory(dim, factory, metric)
    if not index.is_trained:
        more = np.random.default_rng(1).standard_normal((max(0, 700 - len(vectors)), dim))
        index.train(np.concatenate([vectors, more.astype(np.float32)]))
    return faiss.serialize_index(index)


def hold(index: Any, wanted: Mapping[int, np.ndarray]) -> None:
    """Makes a trained index hold exactly these vectors; of the others none changes its code."""
    outer: Any = faiss.downcast_index(index)
    labels = np.array(list(wanted), np.int64)
    vectors = np.array(list(wanted.values()), np.float32).reshape(len(labels), index.d)
    present = vectors_by_label(index)
    stays = np.array([label in present and np.array_equal(present[label], wanted[label]) for label in wanted], bool)
    if isinstance(outer, faiss.IndexIVF) or _lists_in_a_chain(outer):
        # Decoded and added again, a code of IVF-PQ would change: only what differs is taken out and added.
        outer.remove_ids(np.setdiff1d(list(present), labels[stays]).astype(np.int64))
        outer.add_with_ids(vectors[~stays], labels[~stays])
        return
    outer.reset()
    if isinstance(outer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        outer.add_with_ids(vectors, labels)
    else:
        outer.add(vectors)
    if (flat := _flat_in_a_chain(outer)) is not None and len(labels):
        # Scaled to unit length once more, the last bit of a vector may change.
        view = faiss.rev_swig_ptr(flat.get_xb(), vectors.size).reshape(vectors.shape)
        view[stays] = vectors[stays]


def _lists_in_a_chain(index: Any) -> bool:
    return isinstance(index, faiss.IndexPreTransform) and isinstance(faiss.downcast_index(index.index), faiss.IndexIVF)


def _flat_in_a_chain(index: Any) -> Any:
    """The flat index behind a chain that only scales, if there is one."""
    while isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        index = faiss.downcast_index(index.index)
    if not isinstance(index, faiss.IndexPreTransform):
        return None
    inner = faiss.downcast_index(index.index)
    return inner if isinstance(inner, faiss.IndexFlat) and inner.d == index.d else None


def vectors_by_label(index: Any) -> dict[int, np.ndarray]:
    """What an index holds, read the plain way."""
    outer = faiss.downcast_index(index)
    inner = outer
    direct_map: Any = vars(faiss)["DirectMap"]  # faiss's own type stubs leave it out
    labels = list(range(index.ntotal))
    if isinstance(outer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        labels = faiss.vector_to_array(outer.id_map).tolist()
        inner = faiss.downcast_index(outer.index)
    if isinstance(inner, (faiss.IndexPreTransform, faiss.IndexRefine)):
        if (lists := faiss.try_extract_index_ivf(inner)) is not None:
            lists.set_direct_map_type(direct_map.NoMap)
            lists.make_direct_map()
        found = inner.reconstruct_n(0, index.ntotal) if labels else []
        if lists is not None:
            lists.set_direct_map_type(direct_map.NoMap)
        return dict(zip(labels, found, strict=True))
    if isinstance(outer, faiss.IndexIVF):
        outer.set_direct_map_type(direct_map.Hashtable)
        held = outer.invlists
        assert held is not None
        sizes = [held.list_size(number) for number in range(outer.nlist)]
        parts = [faiss.rev_swig_ptr(held.get_ids(number), size).tolist() for number, size in enumerate(sizes) if size]
        found = {label: outer.reconstruct(label) for part in parts for label in part}
        outer.set_direct_map_type(direct_map.NoMap)
        return found
    return dict(zip(labels, inner.reconstruct_n(0, index.ntotal), strict=True)) if labels else {}
