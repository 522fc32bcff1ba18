"""One FAISS index in memory: how its vectors are read, searched, replaced and rebuilt.

A *position* is a row number of this module's own, 0 to n-1; `labels[position]` is the id under which a search of the
index returns that vector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import Metric, StoreRejected, StoreUnavailable, Vectors
from migrator.adapters.faiss import parts as parts
from migrator.adapters.faiss.parts import translated_faiss

BLOCK = 1 << 14  # vectors handled at once where a whole copy in float32 is not wanted

# Odd multipliers of the row checksum. Fixed permanently: checksums are kept on disk.
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


UNIT = 1e-5  # what an encoder's rounding may leave between a vector's length and 1

UNDO = "undo the migration with `migrator rollback`, or use rollout.strategy shadow with another index"


class Index:
    """A loaded index. Raises `StoreRejected` for a kind whose vectors could not be replaced safely.

    Every method translates what FAISS raises into `StoreRejected`, or `StoreUnavailable` where memory ran out.
    """

    def __init__(self, index: Any, where: str) -> None:
        self._where = where
        self._outer = index
        with translated_faiss(where, "open the index", f"build it again; {parts.INSTEAD}"):
            self._open()

    def _open(self) -> None:
        faiss, where = _faiss(), self._where
        body = parts.downcast(self._outer)
        parts.check(body, where)
        self.name = parts.name(body)
        self.dim = int(body.d)
        self.count = int(body.ntotal)
        self.metric: Metric = "ip" if body.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        self._body = body
        self._leaf = parts.searched_leaf(body)
        self._transforms, self._read_leaf = parts.read_path(body)
        self._id_map = _id_map(body)
        self._keys = self._leaf_keys()  # ids that the leaf knows its vectors by, per position
        self.labels = self._labels()
        self._flat = self._flat_view()
        self._users_direct_map = self._leaf.direct_map.type if self._has_lists else None
        self._direct_map_built = False

    @property
    def _has_lists(self) -> bool:
        return parts.kind(self._leaf) in parts.IVF

    @property
    def _refined(self) -> bool:
        return parts.is_refined(self._body)

    def _leaf_keys(self) -> NDArray[np.int64]:
        faiss, where = _faiss(), self._where
        if not self._has_lists:
            return np.arange(self.count)
        lists = self._leaf.invlists
        sizes = [lists.list_size(number) for number in range(self._leaf.nlist)]
        found = [faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size]
        keys = np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)
        if len(keys) != self.count:
            raise StoreRejected(f"{where} is damaged: its lists hold {len(keys)} vectors, its header says {self.count}")
        if self._id_map is not None and not np.array_equal(keys, np.arange(self.count)):
            raise StoreRejected(f"{where} is damaged: its ID map does not fit its lists; build the index again")
        if self._refined and not np.array_equal(keys, np.arange(self.count)):
            raise StoreRejected(f"{where} is damaged: its lists do not fit its refinement; build the index again")
        return keys

    def _labels(self) -> NDArray[np.int64]:
        faiss, where = _faiss(), self._where
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
        """The vectors of the leaf that is read, where they lie in it as float32."""
        faiss = _faiss()
        flat = self._read_leaf
        if parts.kind(flat) == "IndexHNSWFlat":
            flat = parts.downcast(flat.storage)
        if parts.kind(flat) not in parts.FLAT:
            return None
        if self.count == 0:
            return np.empty((0, flat.d), np.float32)
        view: Vectors = faiss.rev_swig_ptr(flat.get_xb(), self.count * flat.d).reshape(self.count, flat.d)
        return view

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def description(self) -> str:
        """The index in the words of FAISS's factory, and parameters that it has no words for, for people."""
        facts = []
        leaf = self._leaf
        if self._has_lists:
            facts.append(f"nprobe={leaf.nprobe}")
        if parts.kind(leaf) in parts.HNSW:
            facts.append(f"efConstruction={leaf.hnsw.efConstruction}, efSearch={leaf.hnsw.efSearch}")
        return self.name + (f" ({', '.join(facts)})" if facts else "")

    @property
    def has_id_map(self) -> bool:
        """Whether the index is wrapped in an ID map."""
        return self._id_map is not None

    @property
    def _exact_leaf(self) -> bool:
        return self._flat is not None or parts.kind(self._read_leaf) == "IndexIVFFlat"

    @property
    def normalises(self) -> bool:
        """Whether nothing but a scaling to unit length stands between a vector and what the index keeps of it."""
        return bool(self._transforms) and self._exact_leaf and all(map(_to_unit_length, self._transforms))

    @property
    def exact_vectors(self) -> bool:
        """Whether vectors come back bit for bit as they were added, but for scaling where the index `normalises`."""
        return self._exact_leaf and (not self._transforms or self.normalises)

    @property
    def updates_in_place(self) -> bool:
        """Whether single vectors can be replaced with the index staying fit to be searched."""
        return self.exact_vectors and not self._refined and parts.kind(self._leaf) in (*parts.FLAT, "IndexIVFFlat")

    @property
    def goes_out_of_balance(self) -> bool:
        """Whether replacing vectors makes searches slower until the index is trained again."""
        return self.updates_in_place and self._has_lists

    @property
    def kept_as_trained(self) -> list[str]:
        """Parts that stay as they were trained on the old vectors, because FAISS cannot train them again."""
        return parts.kept_as_trained(self._body)

    # -- reading --------------------------------------------------------------------------------------------------

    def vectors(self, positions: NDArray[np.int64]) -> Vectors:
        """(m,) positions -> (m, dim) float32, a copy; approximate unless `exact_vectors`."""
        with translated_faiss(self._where, "read vectors back", f"build the index again; {parts.INSTEAD}"):
            return self._outward(self._kept(positions))

    def _kept(self, positions: NDArray[np.int64]) -> Vectors:
        """(m,) -> (m, dim of the leaf): what the leaf holds, behind all transforms."""
        faiss = _faiss()
        if self._flat is not None:
            return self._flat[positions]
        leaf = self._read_leaf
        if len(positions) == 0:
            return np.empty((0, leaf.d), np.float32)
        if parts.kind(leaf) in parts.IVF and not self._direct_map_built:
            self._map_directly(faiss.DirectMap.Hashtable)
            self._direct_map_built = True
        keys = self._keys if parts.kind(leaf) in parts.IVF else np.arange(self.count)
        return np.asarray(leaf.reconstruct_batch(keys[positions]), np.float32)

    def _outward(self, kept: Vectors) -> Vectors:
        for transform in reversed(self._transforms):
            kept = parts.reverse(transform, kept)
        return kept

    def _inward(self, vectors: Vectors) -> Vectors:
        for transform in self._transforms:
            vectors = transform.apply(np.ascontiguousarray(vectors))
        return vectors

    def as_kept(self, vectors: Vectors) -> Vectors:
        """(m, dim) -> (m, dim): `vectors` as this index would keep them, where it `normalises`; else as they are.

        Vectors of unit length stay bit for bit, so that what was read can be put back.
        """
        if not self.normalises or len(vectors) == 0:
            return vectors
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        scaled = (np.abs(lengths - 1) > UNIT) & (lengths > 0) & np.isfinite(lengths)
        return np.where(scaled, vectors / np.where(scaled, lengths, 1), vectors).astype(np.float32)

    def approximations(self, vectors: Vectors) -> Vectors:
        """(m, dim) -> (m, dim): what `vectors` would be read back as, if they were in this index; as they are while it
        is untrained, and holds none."""
        if len(vectors) == 0 or not self._body.is_trained:
            return vectors
        with translated_faiss(self._where, "encode vectors", f"build the index again; {parts.INSTEAD}"):
            return self._outward(parts.coded(self._read_leaf, self._inward(vectors)))

    @cached_property
    def checksums(self) -> NDArray[np.uint64]:
        """`row_checksums` of all vectors, by position."""
        if self._flat is not None and not self._transforms:
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
        with translated_faiss(self._where, "search", f"build the index again; {parts.INSTEAD}"):
            if exact:
                scores, labels = self._search_all(self._inward(queries), k)
            else:
                scores, labels = self._outer.search(queries, k)
        return (scores if self.metric == "ip" else -scores), labels

    def _search_all(self, queries: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`queries` (n, dim of the leaf), behind all transforms."""
        faiss = _faiss()
        metric = self._leaf.metric_type
        nearer = metric == faiss.METRIC_INNER_PRODUCT
        best = np.empty((len(queries), 0), np.float32)
        labels = np.empty((len(queries), 0), np.int64)
        for start in range(0, self.count, BLOCK):
            block = np.arange(start, min(start + BLOCK, self.count))
            scores, rows = faiss.knn(queries, self._kept(block), min(k, len(block)), metric=metric)
            best = np.concatenate([best, scores], axis=1)
            labels = np.concatenate([labels, np.where(rows < 0, -1, self.labels[block][rows])], axis=1)
            order = np.argsort(-best if nearer else best, axis=1, kind="stable")[:, :k]
            best, labels = np.take_along_axis(best, order, 1), np.take_along_axis(labels, order, 1)
        return best, labels

    # -- changing -------------------------------------------------------------------------------------------------

    def replace(self, positions: NDArray[np.int64], vectors: Vectors) -> None:
        """Puts `vectors` (m, dim) in the place of those at `positions`. Only where `updates_in_place`."""
        faiss = _faiss()
        vectors = self.as_kept(vectors)
        with translated_faiss(self._where, "replace vectors", UNDO):
            if self._flat is not None:
                self._flat[positions] = vectors
            else:
                # Taken out and added, each lands in the list of its nearest centroid, where a search looks for it.
                keys = self._keys[positions]
                self._map_directly(faiss.DirectMap.NoMap)
                self._leaf.remove_ids(keys)
                self._leaf.add_with_ids(np.ascontiguousarray(vectors), keys)
        self.__dict__.pop("checksums", None)

    def rebuild(self, vectors: Vectors) -> None:
        """Builds the index again over `vectors` (count, dim, by position), with the parameters it has.

        What the index learnt from its vectors (rotations, centroids, code books, ranges) is learnt again, but for
        `kept_as_trained` and unless there are fewer vectors than FAISS needs for that.
        """
        vectors = np.ascontiguousarray(self.as_kept(vectors))
        with translated_faiss(self._where, "rebuild the index", UNDO):
            self._empty()
            if self.count >= parts.training_needs(self._body):
                parts.train(self._body, vectors)
            self._add(vectors, self.labels)
            self._flat = self._flat_view()
            if self.normalises:  # FAISS scales once more, which may change the last bit
                self._put_bits(vectors)
        self.__dict__.pop("checksums", None)

    def _put_bits(self, vectors: Vectors) -> None:
        """Overwrites every vector by one that differs from it in rounding at most."""
        if self._flat is not None:
            self._flat[:] = vectors
            return
        faiss, lists = _faiss(), self._leaf.invlists
        for number in range(self._leaf.nlist):
            size = lists.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
                codes[:] = vectors[np.searchsorted(self._keys, ids)].view(np.uint8).ravel()

    def fill(self, vectors: Vectors, labels: NDArray[np.int64]) -> None:
        """Makes the index hold exactly `vectors` (m, dim) under `labels` (m,), with the parameters it has.

        What it learns from vectors is learnt again, unless there are fewer than FAISS needs; if it has never learnt,
        it learns from them and from random directions.
        """
        vectors = np.ascontiguousarray(self.as_kept(vectors), np.float32)
        with translated_faiss(self._where, "build the index", UNDO):
            self._empty()
            needs = parts.training_needs(self._body)
            if len(vectors) >= needs or not self._body.is_trained:
                more = np.random.default_rng(0).standard_normal((max(0, needs - len(vectors)), self.dim))
                parts.train(self._body, np.concatenate([vectors, more.astype(np.float32)]))
            self._add(vectors, labels)

    def _empty(self) -> None:
        if self._has_lists:
            self._map_directly(_faiss().DirectMap.NoMap)
        self._body.reset()

    def _add(self, vectors: Vectors, labels: NDArray[np.int64]) -> None:
        if len(vectors) == 0:
            return  # adding none to a fast scan index ends the process
        if self._id_map is not None or (self._has_lists and not self._refined):
            self._body.add_with_ids(vectors, labels)
        else:
            self._body.add(vectors)

    def reread(self) -> Index:
        """This index as another reader will see it."""
        return Index(self._outer, "the filled index")

    def like(self, dim: int) -> Index:
        """An empty index of the same kind and parameters, for vectors of `dim`. It has learnt nothing.

        Raises `StoreRejected` where FAISS cannot make one for `dim`, or a parameter could not be carried over.
        """
        doing = f"make a second index for {dim} dimensions"
        with translated_faiss(self._where, doing, "use rollout.strategy in_place"):
            return Index(parts.empty_like(self._body, dim), "the new index")

    def _map_directly(self, kind: int) -> None:
        """Builds the table from ids to places in the lists again. One that came from a file, or outlived a reset, may
        have lost entries."""
        self._leaf.set_direct_map_type(_faiss().DirectMap.NoMap)
        self._leaf.set_direct_map_type(kind)
        self._direct_map_built = False

    def write(self, write: Callable[[bytes], object]) -> None:
        """Hands the index to `write` piece by piece, as FAISS's file format. Errors of `write` pass through."""
        faiss = _faiss()
        with translated_faiss(self._where, "write the index", UNDO):
            if self._users_direct_map is not None:
                self._map_directly(self._users_direct_map)
            # Not write_index(path): it does not notice when the last buffer does not fit on the disk.
            faiss.write_index(self._outer, faiss.PyCallbackIOWriter(write))


def _id_map(index: Any) -> Any:
    while parts.kind(index) not in parts.LEAVES:
        if parts.kind(index) in parts.ID_MAPS:
            return index
        index = parts.within(index)[0][1]
    return None


def _to_unit_length(transform: Any) -> bool:
    return parts.kind(transform) == parts.NORMALISING and transform.norm == 2


def read_index(path: str, read: Callable[[int], bytes]) -> Index:
    """The index that `read(size)` gives piece by piece. `path` is for messages."""
    faiss = _faiss()
    try:
        index = faiss.read_index(faiss.PyCallbackIOReader(read))
    except MemoryError as error:
        raise StoreUnavailable(f"{path}: there is not enough memory to read the index") from error
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = parts.reason_of(error)
        raise StoreRejected(f"{path} cannot be read as a FAISS index: truncated or not one ({reason})") from error
    return Index(index, path)


def _faiss() -> Any:
    """The library, untyped: its stubs know only the base class of all indexes."""
    import faiss

    return faiss
