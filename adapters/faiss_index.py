"""One FAISS index in memory: which kinds are understood, how their vectors are read, replaced and rebuilt.

A *position* is a row number of this module's own, 0 to n-1; `labels[position]` is the id under which a search of the
index returns that vector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import Metric, StoreRejected, Vectors

FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
HNSW = ("IndexHNSWFlat", "IndexHNSWSQ", "IndexHNSWPQ")
IVF = ("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ")
PLAIN_QUANTISED = ("IndexScalarQuantizer", "IndexPQ")
UNDERSTOOD = (*FLAT, *HNSW, *IVF, *PLAIN_QUANTISED)

BLOCK = 1 << 14  # vectors handled at once where a whole copy in float32 is not wanted

# Odd multipliers of the row checksum. Fixed for ever: checksums are kept on disk.
_WORD = np.uint64(0x9E3779B97F4A7C15)


def row_checksums(vectors: Vectors) -> NDArray[np.uint64]:
    """A 64-bit checksum of the bits of each row; equal on every machine.

    (n, dim) float32 -> (n,) uint64. Multilinear hashing of the 32-bit words with odd multipliers taken from
    SplitMix64 (Steele, Lea, Flood 2014), whose finaliser also mixes the sum. It tells versions of one item's vector
    apart; it is not meant to withstand an adversary.
    """
    multipliers = _mix(np.arange(1, vectors.shape[1] + 1, dtype=np.uint64) * _WORD) | np.uint64(1)
    sums = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), BLOCK):
        words = np.ascontiguousarray(vectors[start : start + BLOCK], "<f4").view("<u4").astype(np.uint64)
        sums[start : start + BLOCK] = np.einsum("ij,j->i", words, multipliers)
    return _mix(sums + _WORD)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Index:
    """A loaded index. Raises `StoreRejected` for a kind whose vectors could not be replaced safely."""

    def __init__(self, index: Any, where: str) -> None:
        faiss = _faiss()
        self._outer = index
        self._id_map = None
        inner = faiss.downcast_index(index)
        outer_kind = type(inner).__name__
        if outer_kind in ("IndexIDMap", "IndexIDMap2"):
            self._id_map = inner
            inner = faiss.downcast_index(inner.index)
        self._inner = inner
        self._kind = type(inner).__name__
        self.name = self._kind if self._id_map is None else f"{outer_kind}({self._kind})"
        self._check(where)
        self.dim = int(inner.d)
        self.count = int(index.ntotal)
        self.metric: Metric = "ip" if inner.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        self._keys = self._inner_keys(where)  # ids that the inner index knows its vectors by, per position
        self.labels = self._labels(where)
        self._flat = self._flat_view()
        self._users_direct_map = inner.direct_map.type if self._kind in IVF else None
        self._direct_map_built = False

    def _check(self, where: str) -> None:
        faiss = _faiss()
        inner = self._inner
        if self._kind not in UNDERSTOOD:
            raise StoreRejected(
                f"{where} is a {self.name}, whose vectors cannot be replaced safely: understood are Flat, IVFFlat, "
                "HNSW, SQ, PQ, IVF-SQ and IVF-PQ, also inside IndexIDMap and IndexIDMap2"
            )
        if inner.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
            raise StoreRejected(f"{where} has the metric {inner.metric_type}: only inner product and L2 are understood")
        quantizer = self._scalar_quantizer()
        if quantizer is not None and quantizer.qtype in _direct_types():
            raise StoreRejected(f"{where} stores vectors of small integers, which an encoder does not give")
        if self._kind in IVF and type(faiss.downcast_InvertedLists(inner.invlists)).__name__ != "ArrayInvertedLists":
            raise StoreRejected(
                f"{where} keeps its inverted lists in another file: only lists in the index are understood"
            )
        if self._outer.ntotal != inner.ntotal:
            raise StoreRejected(f"{where} is damaged: {self._outer.ntotal} ids for {inner.ntotal} vectors")

    def _scalar_quantizer(self) -> Any:
        faiss = _faiss()
        if self._kind in ("IndexScalarQuantizer", "IndexIVFScalarQuantizer"):
            return self._inner.sq
        return faiss.downcast_index(self._inner.storage).sq if self._kind == "IndexHNSWSQ" else None

    def _product_quantizer(self) -> Any:
        faiss = _faiss()
        if self._kind in ("IndexPQ", "IndexIVFPQ"):
            return self._inner.pq
        return faiss.downcast_index(self._inner.storage).pq if self._kind == "IndexHNSWPQ" else None

    def _inner_keys(self, where: str) -> NDArray[np.int64]:
        faiss = _faiss()
        if self._kind not in IVF:
            return np.arange(self.count)
        lists = self._inner.invlists
        sizes = [lists.list_size(number) for number in range(self._inner.nlist)]
        parts = [faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size]
        keys = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        if len(keys) != self.count:
            raise StoreRejected(f"{where} is damaged: its lists hold {len(keys)} vectors, its header says {self.count}")
        if self._id_map is not None and not np.array_equal(keys, np.arange(self.count)):
            raise StoreRejected(f"{where} is damaged: its ID map does not fit its lists; build the index again")
        return keys

    def _labels(self, where: str) -> NDArray[np.int64]:
        faiss = _faiss()
        labels = self._keys if self._id_map is None else faiss.vector_to_array(self._id_map.id_map).astype(np.int64)
        if len(labels) != self.count:
            raise StoreRejected(f"{where} is damaged: {len(labels)} ids for {self.count} vectors")
        if (labels == -1).any():
            raise StoreRejected(f"{where} holds the FAISS id -1, which in answers means none: give that item another")
        ordered = np.sort(labels)
        twice = ordered[:-1][ordered[:-1] == ordered[1:]]
        if len(twice):
            raise StoreRejected(f"{where} holds the FAISS id {twice[0]} more than once: ids must be unique")
        return labels

    def _flat_view(self) -> Vectors | None:
        """The vectors where they lie in the index, if they lie there as float32."""
        faiss = _faiss()
        if self._kind in FLAT:
            flat = self._inner
        elif self._kind == "IndexHNSWFlat":
            flat = faiss.downcast_index(self._inner.storage)
        else:
            return None
        if self.count == 0:
            return np.empty((0, self.dim), np.float32)
        view: Vectors = faiss.rev_swig_ptr(flat.get_xb(), self.count * self.dim).reshape(self.count, self.dim)
        return view

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def description(self) -> str:
        """The kind of index and the parameters that a rebuild keeps, for people."""
        facts = []
        if self._kind in IVF:
            facts.append(f"nlist={self._inner.nlist}")
        if self._kind in HNSW:
            facts.append(f"M={self._inner.hnsw.nb_neighbors(1)}, efConstruction={self._inner.hnsw.efConstruction}")
        if (pq := self._product_quantizer()) is not None:
            facts.append(f"{pq.M}x{pq.nbits} bits")
        if (sq := self._scalar_quantizer()) is not None:
            facts.append(f"{sq.code_size} bytes a vector")
        return self.name + (f" ({', '.join(facts)})" if facts else "")

    @property
    def has_id_map(self) -> bool:
        """Whether the index is wrapped in an ID map."""
        return self._id_map is not None

    @property
    def updates_in_place(self) -> bool:
        """Whether single vectors can be replaced with the index staying fit to be searched."""
        return self._kind in FLAT or self._kind == "IndexIVFFlat"

    @property
    def goes_out_of_balance(self) -> bool:
        """Whether replacing vectors makes searches slower until the index is trained anew."""
        return self._kind == "IndexIVFFlat"

    @property
    def exact_vectors(self) -> bool:
        """Whether vectors come back bit for bit as they were added."""
        return self._flat is not None or self._kind == "IndexIVFFlat"

    # -- reading --------------------------------------------------------------------------------------------------

    def vectors(self, positions: NDArray[np.int64]) -> Vectors:
        """(m,) positions -> (m, dim) float32, a copy; approximate where the index is quantised."""
        faiss = _faiss()
        if self._flat is not None:
            return self._flat[positions]
        if len(positions) == 0:
            return np.empty((0, self.dim), np.float32)
        if self._kind in IVF and not self._direct_map_built:
            self._map_directly(faiss.DirectMap.Hashtable)
            self._direct_map_built = True
        return np.asarray(self._inner.reconstruct_batch(self._keys[positions]), np.float32)

    @cached_property
    def checksums(self) -> NDArray[np.uint64]:
        """`row_checksums` of all vectors, by position."""
        if self._flat is not None:
            return row_checksums(self._flat)
        sums = np.empty(self.count, np.uint64)
        for start in range(0, self.count, BLOCK):
            block = np.arange(start, min(start + BLOCK, self.count))
            sums[block] = row_checksums(self.vectors(block))
        return sums

    def search(self, queries: Vectors, k: int, *, exact: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(n, dim) -> scores and labels, each (n, k): larger is nearer; label -1 where there is no answer.

        `exact` compares with every vector; otherwise the index answers as it answers its other readers.
        """
        k = min(k, self.count)
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if exact:
            scores, labels = self._search_all(queries, k)
        else:
            scores, labels = self._outer.search(queries, k)
        return (scores if self.metric == "ip" else -scores), labels

    def _search_all(self, queries: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        faiss = _faiss()
        nearer = self._inner.metric_type == faiss.METRIC_INNER_PRODUCT
        best = np.empty((len(queries), 0), np.float32)
        labels = np.empty((len(queries), 0), np.int64)
        for start in range(0, self.count, BLOCK):
            block = np.arange(start, min(start + BLOCK, self.count))
            scores, rows = faiss.knn(queries, self.vectors(block), min(k, len(block)), metric=self._inner.metric_type)
            best = np.concatenate([best, scores], axis=1)
            labels = np.concatenate([labels, np.where(rows < 0, -1, self.labels[block][rows])], axis=1)
            order = np.argsort(-best if nearer else best, axis=1, kind="stable")[:, :k]
            best, labels = np.take_along_axis(best, order, 1), np.take_along_axis(labels, order, 1)
        return best, labels

    # -- changing -------------------------------------------------------------------------------------------------

    def replace(self, positions: NDArray[np.int64], vectors: Vectors) -> None:
        """Puts `vectors` (m, dim) in the place of those at `positions`. Only where `updates_in_place`."""
        faiss = _faiss()
        if self._flat is not None:
            self._flat[positions] = vectors
        else:
            # Taken out and added, each lands in the list of its nearest centroid, where a search looks for it.
            keys = self._keys[positions]
            self._map_directly(faiss.DirectMap.NoMap)
            self._inner.remove_ids(keys)
            self._inner.add_with_ids(np.ascontiguousarray(vectors), keys)
        self.__dict__.pop("checksums", None)

    def rebuild(self, vectors: Vectors) -> None:
        """Builds the index anew over `vectors` (count, dim, by position), with the parameters it has.

        What the index learnt from its vectors (centroids, code books, ranges) is learnt anew, unless there are fewer
        vectors than FAISS needs for that.
        """
        faiss = _faiss()
        inner = self._inner
        vectors = np.ascontiguousarray(vectors)
        if self._kind in IVF:
            self._map_directly(faiss.DirectMap.NoMap)
        inner.reset()
        if self.count >= self._training_needs():
            self._forget_training()
            inner.train(vectors)
        if self._kind in IVF:
            inner.add_with_ids(vectors, self._keys)
        else:
            inner.add(vectors)
        self._flat = self._flat_view()
        self.__dict__.pop("checksums", None)

    def fill(self, vectors: Vectors, labels: NDArray[np.int64]) -> None:
        """Makes the index hold exactly `vectors` (m, dim) under `labels` (m,), with the parameters it has.

        What it learns from vectors is learnt anew, unless there are fewer than FAISS needs; if it has never learnt,
        it learns from them and from random directions.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if self._kind in IVF:
            self._map_directly(_faiss().DirectMap.NoMap)
        inner = self._inner
        self._outer.reset()
        needs = self._training_needs()
        if len(vectors) >= needs or not inner.is_trained:
            self._forget_training()
            more = np.random.default_rng(0).standard_normal((max(0, needs - len(vectors)), self.dim))
            inner.train(np.concatenate([vectors, more.astype(np.float32)]))
        if self._id_map is not None or self._kind in IVF:
            self._outer.add_with_ids(vectors, labels)
        else:
            self._outer.add(vectors)

    def reread(self) -> Index:
        """This index as another reader will see it."""
        return Index(self._outer, "the filled index")

    def like(self, dim: int) -> Index:
        """An empty index of the same kind and parameters, for vectors of `dim`. It has learnt nothing."""
        faiss = _faiss()
        inner, metric = self._inner, self._inner.metric_type
        pq, sq = self._product_quantizer(), self._scalar_quantizer()
        if pq is not None and dim % pq.M:
            raise StoreRejected(
                f"{self.name} cuts vectors into {pq.M} parts, which does not divide {dim}: choose another dimension"
            )
        if self._kind in IVF:
            quantizer = faiss.downcast_index(inner.quantizer)
            if type(quantizer).__name__ not in FLAT:
                raise StoreRejected(f"{self.name} has a coarse quantizer of the kind {type(quantizer).__name__}")
            coarse = faiss.IndexFlat(dim, quantizer.metric_type)
        if self._kind in FLAT:
            made = faiss.IndexFlat(dim, metric)
        elif self._kind == "IndexHNSWFlat":
            made = faiss.IndexHNSWFlat(dim, inner.hnsw.nb_neighbors(1), metric)
        elif self._kind == "IndexHNSWSQ":
            made = faiss.IndexHNSWSQ(dim, sq.qtype, inner.hnsw.nb_neighbors(1), metric)
        elif self._kind == "IndexHNSWPQ":
            made = faiss.IndexHNSWPQ(dim, pq.M, inner.hnsw.nb_neighbors(1), pq.nbits, metric)
        elif self._kind == "IndexScalarQuantizer":
            made = faiss.IndexScalarQuantizer(dim, sq.qtype, metric)
        elif self._kind == "IndexPQ":
            made = faiss.IndexPQ(dim, pq.M, pq.nbits, metric)
            made.search_type = inner.search_type
        elif self._kind == "IndexIVFFlat":
            made = faiss.IndexIVFFlat(coarse, dim, inner.nlist, metric)
        elif self._kind == "IndexIVFScalarQuantizer":
            made = faiss.IndexIVFScalarQuantizer(coarse, dim, inner.nlist, sq.qtype, metric, inner.by_residual)
        else:
            made = faiss.IndexIVFPQ(coarse, dim, inner.nlist, pq.M, pq.nbits, metric)
            made.by_residual, made.polysemous_ht = inner.by_residual, inner.polysemous_ht
        if self._kind in IVF:
            made.own_fields = True
            coarse.this.disown()
            made.nprobe = inner.nprobe
        if self._kind in HNSW:
            made.hnsw.efConstruction, made.hnsw.efSearch = inner.hnsw.efConstruction, inner.hnsw.efSearch
        if self._id_map is not None:
            outer = type(self._id_map)(made)
            outer.own_fields = True
            made.this.disown()
            made = outer
        return Index(made, "the new index")

    def _map_directly(self, kind: int) -> None:
        """Builds the table from ids to places in the lists anew. One that came from a file, or outlived a reset, may
        have lost entries."""
        self._inner.set_direct_map_type(_faiss().DirectMap.NoMap)
        self._inner.set_direct_map_type(kind)
        self._direct_map_built = False

    def _training_needs(self) -> int:
        pq = self._product_quantizer()
        return max(1, self._inner.nlist if self._kind in IVF else 0, 0 if pq is None else int(pq.ksub))

    def _forget_training(self) -> None:
        faiss = _faiss()
        pq = self._product_quantizer()
        if pq is not None:
            pq.cp.min_points_per_centroid = 1  # FAISS prints a warning below 39
        # Index files keep how a PQ index is searched, not how it was trained for that.
        if self._kind == "IndexPQ":
            polysemous = (faiss.IndexPQ.ST_polysemous, faiss.IndexPQ.ST_polysemous_generalize)
            self._inner.do_polysemous_training = self._inner.search_type in polysemous
        if self._kind == "IndexIVFPQ":
            self._inner.do_polysemous_training = self._inner.polysemous_ht > 0
        if self._kind in IVF:
            # Neither setting is kept in index files; the constructors set `spherical` by the metric.
            self._inner.cp.min_points_per_centroid = 1
            self._inner.cp.spherical = self.metric == "ip"
            faiss.downcast_index(self._inner.quantizer).reset()

    def write(self, write: Callable[[bytes], object]) -> None:
        """Hands the index to `write` piece by piece, as FAISS's file format. Errors of `write` pass through."""
        faiss = _faiss()
        if self._users_direct_map is not None:
            self._map_directly(self._users_direct_map)
        # Not write_index(path): it does not notice when the last buffer does not fit on the disk.
        faiss.write_index(self._outer, faiss.PyCallbackIOWriter(write))


def read_index(path: str, read: Callable[[int], bytes]) -> Index:
    """The index that `read(size)` gives piece by piece. `path` is for messages."""
    faiss = _faiss()
    try:
        index = faiss.read_index(faiss.PyCallbackIOReader(read))
    except (RuntimeError, MemoryError, ValueError) as error:
        reason = str(error).rpartition("Error: ")[2].strip().splitlines()[:1] or ["unreadable"]
        raise StoreRejected(f"{path} cannot be read as a FAISS index: truncated or not one ({reason[0]})") from error
    return Index(index, path)


def _faiss() -> Any:
    """The library, untyped: its stubs know only the base class of all indexes."""
    import faiss

    return faiss


def _direct_types() -> tuple[int, ...]:
    faiss = _faiss()
    names = ("QT_8bit_direct", "QT_8bit_direct_signed")
    return tuple(getattr(faiss.ScalarQuantizer, name) for name in names if hasattr(faiss.ScalarQuantizer, name))
