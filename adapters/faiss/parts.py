"""The parts that a FAISS index is made of: which are understood, how each is named, trained, and made for another
dimension.

An index is a tree. An ID map, transforms and a refinement stand around one *leaf* (Flat, HNSW, IVF, SQ or PQ), which
answers searches. A leaf may own more: HNSW a storage, IVF a coarse quantizer. All functions take FAISS's own objects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import StoreError, StoreRejected, StoreUnavailable, Vectors

FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
HNSW = ("IndexHNSWFlat", "IndexHNSWSQ", "IndexHNSWPQ")
IVF = ("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ", "IndexIVFPQFastScan")
SQ = ("IndexScalarQuantizer",)
PQ = ("IndexPQ", "IndexPQFastScan")
LEAVES = (*FLAT, *HNSW, *IVF, *SQ, *PQ)
ID_MAPS = ("IndexIDMap", "IndexIDMap2")
REFINED = ("IndexRefine", "IndexRefineFlat")
REFINERS = (*FLAT, *SQ, *PQ)

TABLE_QUANTIZERS = ("MultiIndexQuantizer", "ResidualCoarseQuantizer", "LocalSearchCoarseQuantizer")
"""Coarse quantizers that are trained by themselves, not on the centroids of a clustering; they cannot be reset."""
RETRAINED_QUANTIZERS = (*FLAT, "IndexHNSWFlat", *TABLE_QUANTIZERS)

NORMALISING = "NormalizationTransform"
LINEAR = ("LinearTransform", "OPQMatrix", "PCAMatrix", "RandomRotationMatrix")
"""y = A x + b. FAISS writes an OPQ matrix to a file as a plain linear transform."""
TRANSFORMS = (*LINEAR, NORMALISING, "CenteringTransform", "HadamardRotation", "RemapDimensionsTransform")

INSTEAD = (
    "understood are Flat, IVF, HNSW, SQ and PQ (also fast scan), behind OPQ, PCA, RR, L2norm or Pad, with or without a "
    "refinement and an ID map"
)

_OPQ_BITS = 8
_ROWS, _STACK = 48, 256  # rows multiplied at once, and how many times that

# What FAISS keeps as one `char` each.
_CLUSTERS, _TRAINS_ALONE, _CLUSTERS_APART = "\x00", "\x01", "\x02"


@contextlib.contextmanager
def translated_faiss(where: str, doing: str, then: str) -> Iterator[None]:
    """Turns what FAISS raises into the store's errors: the one edge to the library.

    FAISS says what it does not like by RuntimeError, AssertionError (its Python layer) and TypeError (SWIG), and
    "out of memory" by MemoryError or, from C++, by a RuntimeError. Errors of files (OSError) pass through.
    """
    try:
        yield
    except StoreError:
        raise
    except (RuntimeError, AssertionError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            raise StoreUnavailable(
                f"{where}: not enough memory to {doing}: nothing was changed; run it again where there is more"
            ) from error
        raise StoreRejected(
            f"{where}: FAISS cannot {doing} ({reason_of(error)}): nothing was changed; {then}"
        ) from error


def reason_of(error: BaseException) -> str:
    """FAISS's own words, without the function and the source line in front of them."""
    lines = str(error).rpartition("Error: ")[2].strip().splitlines()
    return lines[0] if lines else type(error).__name__


def downcast(index: Any) -> Any:
    """The index as what it is; it must be held by somebody else."""
    return _faiss().downcast_index(index)


def kind(index: Any) -> str:
    """The name of the class of a downcast index."""
    return type(index).__name__


def transforms(index: Any) -> list[Any]:
    """The chain of an IndexPreTransform, in the order in which vectors go through it."""
    faiss = _faiss()
    return [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(index.chain.size())]


def within(index: Any) -> list[tuple[str, Any]]:
    """The parts that an index owns, by the attribute that holds them."""
    names: tuple[str, ...] = ()
    if kind(index) in ID_MAPS or kind(index) == "IndexPreTransform":
        names = ("index",)
    elif kind(index) in REFINED:
        names = ("base_index", "refine_index")
    elif kind(index) in HNSW:
        names = ("storage",)
    elif kind(index) in IVF:
        names = ("quantizer",)
    return [(name, downcast(getattr(index, name))) for name in names]


def searched_leaf(index: Any) -> Any:
    """The leaf that answers searches; the innermost part that is known where there is none."""
    while kind(index) not in LEAVES and (inside := within(index)):
        index = inside[0][1]
    return index


def read_path(index: Any) -> tuple[list[Any], Any]:
    """The leaf that holds the best copy of the vectors, and the transforms in front of it, outermost first."""
    chain: list[Any] = []
    while kind(index) not in LEAVES:
        if kind(index) == "IndexPreTransform":
            chain += transforms(index)
        index = within(index)[-1][1]
    return chain, index


def is_refined(index: Any) -> bool:
    """Whether a second copy of the vectors refines what the searched leaf answers."""
    while kind(index) not in (*LEAVES, *REFINED):
        index = within(index)[0][1]
    return kind(index) in REFINED


def product_quantizer(index: Any) -> Any:
    """The product quantizer of a leaf, or None."""
    if kind(index) == "IndexHNSWPQ":
        index = downcast(index.storage)
    return index.pq if kind(index) in (*PQ, "IndexIVFPQ", "IndexIVFPQFastScan") else None


def scalar_quantizer(index: Any) -> Any:
    """The scalar quantizer of a leaf, or None."""
    if kind(index) == "IndexHNSWSQ":
        index = downcast(index.storage)
    return index.sq if kind(index) in (*SQ, "IndexIVFScalarQuantizer") else None


# -- what is understood -----------------------------------------------------------------------------------------------


def check(index: Any, where: str) -> None:
    """Raises `StoreRejected` unless every part is understood and all agree on their number of vectors."""
    _check(index, where, called=name(index), mapped=False, refined=False)


def _check(index: Any, where: str, *, called: str, mapped: bool, refined: bool) -> None:
    this = kind(index)
    if this in LEAVES:
        if this == "IndexIVFPQFastScan" and not refined:
            # FAISS's reconstruct crashes the process on lists that came from a file.
            raise StoreRejected(
                f"{where} is {called}, whose vectors FAISS cannot read back from a file: add a refinement "
                f'("{called},RFlat"), or build it again without fast scan'
            )
        _check_leaf(index, where, called)
    elif this in ID_MAPS and not (mapped or refined):
        mapped = True
    elif this in REFINED and not refined and kind(within(index)[1][1]) in REFINERS:
        refined = True
    elif this == "IndexPreTransform" and all(kind(one) in TRANSFORMS for one in transforms(index)):
        pass
    else:
        raise StoreRejected(_not_understood(where, called))
    for _, part in () if this in LEAVES else within(index):
        if part.ntotal != index.ntotal:
            raise StoreRejected(f"{where} is damaged: {index.ntotal} ids for {part.ntotal} vectors")
        if part.metric_type != index.metric_type:
            raise StoreRejected(f"{where} is damaged: its parts ({called}) have different metrics")
        _check(part, where, called=called, mapped=mapped, refined=refined)


def _check_leaf(index: Any, where: str, called: str) -> None:
    faiss = _faiss()
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise StoreRejected(f"{where} has the metric {index.metric_type}: only inner product and L2 are understood")
    quantizer = scalar_quantizer(index)
    if quantizer is not None and quantizer.qtype in _direct_types():
        raise StoreRejected(f"{where} stores vectors of small integers, which an encoder does not give")
    if kind(index) in HNSW and index.storage.ntotal != index.ntotal:
        raise StoreRejected(f"{where} is damaged: {index.ntotal} nodes for {index.storage.ntotal} vectors")
    if kind(index) in IVF:
        lists = kind(faiss.downcast_InvertedLists(index.invlists))
        if lists not in ("ArrayInvertedLists", "BlockInvertedLists"):
            raise StoreRejected(
                f"{where} keeps its inverted lists in another file: copy them into an index that holds them itself, "
                "by faiss's index.copy_subset_to"
            )
        if index.is_trained and index.quantizer.ntotal != index.nlist:
            raise StoreRejected(
                f"{where} is damaged: {called} has {index.nlist} lists and {index.quantizer.ntotal} centroids"
            )


def _not_understood(where: str, called: str) -> str:
    return (
        f"{where} is {called}, whose vectors cannot be replaced safely: build it again from your vectors as a kind "
        f"that can be; {INSTEAD}"
    )


def _direct_types() -> tuple[int, ...]:
    faiss = _faiss()
    names = ("QT_8bit_direct", "QT_8bit_direct_signed")
    return tuple(getattr(faiss.ScalarQuantizer, name) for name in names if hasattr(faiss.ScalarQuantizer, name))


# -- names ------------------------------------------------------------------------------------------------------------


def name(index: Any) -> str:
    """The index in the words of `faiss.index_factory`; the class where the factory has no word."""
    this = kind(index)
    if this in ID_MAPS:
        return f"{this.removeprefix('Index')},{name(within(index)[0][1])}"
    if this == "IndexPreTransform":
        pq = _pq_behind(index)
        chain = transforms(index)
        words = [_transform_name(one, pq if one is chain[-1] else None) for one in chain]
        return ",".join([*words, name(within(index)[0][1])])
    if this in REFINED:
        base, refine = (part for _, part in within(index))
        return f"{name(base)}," + ("RFlat" if kind(refine) in FLAT else f"Refine({name(refine)})")
    if this in FLAT:
        return "Flat"
    if this in HNSW:
        return f"HNSW{index.hnsw.nb_neighbors(1)},{name(within(index)[0][1])}"
    if this in IVF:
        return f"{_lists_name(index)},{_code_name(index)}"
    return _code_name(index) if this in (*SQ, *PQ) else this


def _code_name(leaf: Any) -> str:
    faiss = _faiss()
    pq, sq = product_quantizer(leaf), scalar_quantizer(leaf)
    if pq is not None:
        return f"PQ{pq.M}x{pq.nbits}" + ("fs" if kind(leaf).endswith("FastScan") else "")
    if sq is not None:
        types = {getattr(faiss.ScalarQuantizer, word): word for word in dir(faiss.ScalarQuantizer) if word[:3] == "QT_"}
        word = types.get(sq.qtype, str(sq.qtype)).removeprefix("QT_")
        return f"SQ{word.removesuffix('bit')}"
    return "Flat"


def _lists_name(index: Any) -> str:
    quantizer = within(index)[0][1]
    this = kind(quantizer)
    if this in FLAT:
        return f"IVF{index.nlist}"
    if this == "IndexHNSWFlat":
        return f"IVF{index.nlist}_HNSW{quantizer.hnsw.nb_neighbors(1)}"
    if this == "MultiIndexQuantizer":
        return f"IMI{quantizer.pq.M}x{quantizer.pq.nbits}"
    if this == "ResidualCoarseQuantizer":
        return f"IVF{index.nlist}(RCQ{quantizer.rq.M}x{_faiss().vector_to_array(quantizer.rq.nbits)[0]})"
    return f"IVF{index.nlist}({name(quantizer)})"


def _transform_name(transform: Any, pq: Any) -> str:
    this = kind(transform)
    if this == NORMALISING:
        return "L2norm"
    if this == "PCAMatrix":
        whitened = "W" if transform.eigen_power else ""
        return f"PCA{whitened}{'R' if transform.random_rotation else ''}{transform.d_out}"
    if is_opq(transform, pq):
        return f"OPQ{pq.M}" + ("" if transform.d_out == transform.d_in else f"_{transform.d_out}")
    words = {"RandomRotationMatrix": "RR", "RemapDimensionsTransform": "Pad"}
    return f"{words[this]}{transform.d_out}" if this in words else {"HadamardRotation": "HR"}.get(this, this)


# -- training ---------------------------------------------------------------------------------------------------------


def is_opq(transform: Any, pq: Any) -> bool:
    """Whether this is the rotation in front of a product quantizer.

    A file does not say so: FAISS writes an OPQ matrix as a linear transform. It writes nothing else as one, except a
    matrix that somebody made by hand, which would hardly be a rotation.
    """
    return (
        pq is not None
        and kind(transform) in ("LinearTransform", "OPQMatrix")
        and not transform.have_bias
        and (transform.is_orthonormal or not transform.is_trained)
    )


def _pq_behind(index: Any) -> Any:
    return product_quantizer(searched_leaf(within(index)[0][1]))


def kept_as_trained(index: Any) -> list[str]:
    """What a rebuild leaves as it was trained on the old vectors, because FAISS cannot train it again."""
    kept = []
    if kind(index) == "IndexPreTransform":
        chain, pq = transforms(index), _pq_behind(index)
        kept += [
            "linear transform"
            for one in chain
            if kind(one) in ("LinearTransform", "OPQMatrix") and not is_opq(one, pq if one is chain[-1] else None)
        ]
    if kind(index) in IVF and kind(quantizer := within(index)[0][1]) not in RETRAINED_QUANTIZERS:
        return [f"coarse quantizer {name(quantizer)}"]
    return kept + [word for _, part in within(index) for word in kept_as_trained(part)]


def training_needs(index: Any) -> int:
    """How many vectors FAISS needs at least to train every part that can be trained."""
    pq = product_quantizer(index) if kind(index) in LEAVES else None
    needs = [1, 0 if pq is None else int(pq.ksub)]
    if kind(index) == "IndexPreTransform":
        needs += [one.d_in for one in transforms(index) if kind(one) == "PCAMatrix"]
    if kind(index) not in IVF:
        return max(needs + [training_needs(part) for _, part in within(index)])
    quantizer = within(index)[0][1]
    if kind(quantizer) == "MultiIndexQuantizer":
        needs.append(int(quantizer.pq.ksub))
    elif kind(quantizer) in RETRAINED_QUANTIZERS:
        needs.append(int(index.nlist))
    return max(needs)


def train(index: Any, vectors: Vectors) -> None:
    """Trains an empty index on `vectors` (n, dim), whatever it was trained on before.

    FAISS itself skips what is trained already, so each part is asked for by itself. What `kept_as_trained` names
    stays.
    """
    this = kind(index)
    if this == "IndexPreTransform":
        chain, pq = transforms(index), _pq_behind(index)
        for one in chain:
            _train_transform(one, vectors, pq if one is chain[-1] else None)
            vectors = np.ascontiguousarray(one.apply(vectors))
    if this in IVF:
        _prepare_lists(index)
    if this in (*IVF, *SQ, *PQ):
        _prepare_codes(index)
        index.is_trained = False  # fast scan would skip its training
        index.train(vectors)
    else:
        for _, part in within(index):
            train(part, vectors)
    index.is_trained = True


def _train_transform(transform: Any, vectors: Vectors, pq: Any) -> None:
    faiss = _faiss()
    if is_opq(transform, pq):
        rotation = faiss.OPQMatrix(transform.d_in, pq.M, transform.d_out)
        # FAISS's factory trains it for codes of 8 bits, whatever those behind it have.
        bits = _OPQ_BITS if len(vectors) >= 1 << _OPQ_BITS else pq.nbits
        codes = faiss.ProductQuantizer(transform.d_out, pq.M, bits)
        codes.cp.min_points_per_centroid = 1  # FAISS prints a warning below 39
        rotation.pq = codes
        rotation.train(vectors)
        rotation.pq = None  # it is this function's
        faiss.copy_array_to_vector(faiss.vector_to_array(rotation.A), transform.A)
        transform.set_is_orthonormal()
        transform.is_trained = True
    elif kind(transform) in ("PCAMatrix", "CenteringTransform") or not transform.is_trained:
        transform.train(vectors)


def _prepare_lists(index: Any) -> None:
    # Files keep none of these settings; FAISS's factory sets them as it is done here.
    index.cp.min_points_per_centroid = 1
    index.cp.spherical = index.metric_type == _faiss().METRIC_INNER_PRODUCT
    quantizer = within(index)[0][1]
    if kind(quantizer) in TABLE_QUANTIZERS:
        quantizer.is_trained, quantizer.ntotal = False, 0
        index.quantizer_trains_alone = _TRAINS_ALONE
    elif kind(quantizer) in RETRAINED_QUANTIZERS:
        quantizer.reset()
        index.quantizer_trains_alone = _CLUSTERS if kind(quantizer) in FLAT else _CLUSTERS_APART


def _prepare_codes(index: Any) -> None:
    faiss = _faiss()
    if (pq := product_quantizer(index)) is not None:
        pq.cp.min_points_per_centroid = 1
    # Index files keep how a PQ index is searched, not how it was trained for that.
    if kind(index) == "IndexPQ":
        polysemous = (faiss.IndexPQ.ST_polysemous, faiss.IndexPQ.ST_polysemous_generalize)
        index.do_polysemous_training = index.search_type in polysemous
    if kind(index) == "IndexIVFPQ":
        index.do_polysemous_training = index.polysemous_ht > 0


# -- reading through transforms ---------------------------------------------------------------------------------------


def reverse(transform: Any, vectors: Vectors) -> Vectors:
    """(n, d_out) -> (n, d_in): what `transform` was given, as nearly as can be told.

    FAISS's own reversal is right for rotations only: where a matrix scales (whitening), its pseudo-inverse is taken.
    A row comes out bit for bit the same whatever rows it is reversed with: checksums are taken of it.
    """
    if kind(transform) not in (*LINEAR, "HadamardRotation"):
        return np.asarray(transform.reverse_transform(np.ascontiguousarray(vectors)), np.float32)
    faiss = _faiss()
    if kind(transform) == "HadamardRotation":  # FAISS reverses it only where no dimension is padded
        matrix = transform.apply(np.eye(transform.d_in, dtype=np.float32)).T
    else:
        matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        if transform.have_bias:
            vectors = vectors - faiss.vector_to_array(transform.b)
    return _times(vectors, _inverse(matrix).T)


def _times(vectors: Vectors, matrix: NDArray[np.float32]) -> Vectors:
    """(n, a) times (a, b), each row by itself: BLAS rounds by the shape, so it gets one shape, in double precision."""
    found = np.empty((len(vectors), matrix.shape[1]), np.float32)
    wide = matrix.astype(np.float64)
    for start in range(0, len(vectors), _ROWS * _STACK):
        part = vectors[start : start + _ROWS * _STACK]
        stack = np.zeros((-(-len(part) // _ROWS), _ROWS, len(matrix)))
        stack.reshape(-1, len(matrix))[: len(part)] = part
        found[start : start + len(part)] = (stack @ wide).reshape(-1, matrix.shape[1])[: len(part)]
    return found


def _inverse(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    rotated = np.allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-4)
    return matrix.T if rotated else np.linalg.pinv(matrix).astype(np.float32)


def coded(leaf: Any, vectors: Vectors) -> Vectors:
    """(n, d) -> (n, d): what a trained leaf keeps of `vectors`."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if kind(leaf) in HNSW:
        leaf = downcast(leaf.storage)
    if kind(leaf) in FLAT or kind(leaf) == "IndexIVFFlat":
        return vectors
    if kind(leaf) == "IndexPQFastScan":  # it has no codec of its own
        return np.asarray(leaf.pq.decode(leaf.pq.compute_codes(vectors)), np.float32)
    return np.asarray(leaf.sa_decode(leaf.sa_encode(vectors)), np.float32)


# -- an empty index of the same kind ----------------------------------------------------------------------------------


def empty_like(index: Any, dim: int) -> Any:
    """An empty, untrained index with the same parts and parameters, for vectors of `dim`, as a file gives it back.

    Raises `StoreRejected` where a part cannot be made for `dim`, or a parameter could not be carried over.
    """
    faiss = _faiss()
    # As a file gives it back, both have lost the same: what files do not keep.
    made = faiss.deserialize_index(faiss.serialize_index(_like(index, dim)))
    _copy_settings(index, made)
    wanted, found = settings(index), settings(made)
    lost = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if lost:
        what = ", ".join(f"{key}={wanted.get(key)}" for key in lost[:3])
        raise StoreRejected(
            f"a second index like {name(index)} for {dim} dimensions would lose {what}: choose rollout.strategy "
            "in_place, or build that index again with the defaults of FAISS"
        )
    return made


def _like(index: Any, dim: int) -> Any:
    faiss = _faiss()
    this = kind(index)
    if this in ID_MAPS:
        made = getattr(faiss, this)(_owned(_like(within(index)[0][1], dim)))
        made.own_fields = True
    elif this == "IndexPreTransform":
        made = _transformed_like(index, dim)
    elif this in REFINED:
        base, refine = (_owned(_like(part, dim)) for _, part in within(index))
        flat = kind(refine) in FLAT
        made = faiss.IndexRefineFlat(base) if flat else faiss.IndexRefine(base, refine)
        if flat:
            made.refine_index = refine
        made.own_fields = made.own_refine_index = True
    elif this in IVF:
        made = _lists_like(index, dim)
    else:
        made = _plain_like(index, dim)
    made.metric_arg = index.metric_arg
    return made


def _plain_like(index: Any, dim: int) -> Any:
    faiss = _faiss()
    this, metric = kind(index), index.metric_type
    pq, sq = _fitting_pq(index, dim), scalar_quantizer(index)
    if this in FLAT:
        return faiss.IndexFlat(dim, metric)
    if this == "IndexHNSWFlat":
        return faiss.IndexHNSWFlat(dim, index.hnsw.nb_neighbors(1), metric)
    if this == "IndexHNSWSQ":
        return faiss.IndexHNSWSQ(dim, sq.qtype, index.hnsw.nb_neighbors(1), metric)
    if this == "IndexHNSWPQ":
        return faiss.IndexHNSWPQ(dim, pq.M, index.hnsw.nb_neighbors(1), pq.nbits, metric)
    if this == "IndexScalarQuantizer":
        return faiss.IndexScalarQuantizer(dim, sq.qtype, metric)
    if this == "IndexPQ":
        return faiss.IndexPQ(dim, pq.M, pq.nbits, metric)
    return faiss.IndexPQFastScan(dim, pq.M, pq.nbits, metric, index.bbs)


def _lists_like(index: Any, dim: int) -> Any:
    faiss = _faiss()
    this, metric = kind(index), index.metric_type
    pq, sq = _fitting_pq(index, dim), scalar_quantizer(index)
    coarse = _owned(_quantizer_like(index, dim))
    if this == "IndexIVFFlat":
        made = faiss.IndexIVFFlat(coarse, dim, index.nlist, metric)
    elif this == "IndexIVFScalarQuantizer":
        made = faiss.IndexIVFScalarQuantizer(coarse, dim, index.nlist, sq.qtype, metric, index.by_residual)
    elif this == "IndexIVFPQ":
        made = faiss.IndexIVFPQ(coarse, dim, index.nlist, pq.M, pq.nbits, metric)
    else:
        made = faiss.IndexIVFPQFastScan(coarse, dim, index.nlist, pq.M, pq.nbits, metric, index.bbs)
    made.own_fields = True
    return made


def _quantizer_like(index: Any, dim: int) -> Any:
    faiss = _faiss()
    quantizer = within(index)[0][1]
    if dim == index.d and kind(quantizer) not in (*FLAT, "IndexHNSWFlat"):
        return faiss.clone_index(quantizer)  # trained or not, it is trained again with the first vectors
    if kind(quantizer) in (*FLAT, "IndexHNSWFlat"):
        return _like(quantizer, dim)
    if kind(quantizer) == "MultiIndexQuantizer":
        _check_divides(quantizer.pq.M, dim, name(index))
        return faiss.MultiIndexQuantizer(dim, quantizer.pq.M, quantizer.pq.nbits)
    raise StoreRejected(
        f"the coarse quantizer of {name(index)} cannot be made for {dim} dimensions: choose an encoder with {index.d}, "
        f'or build the index again with another one, for instance "IVF{index.nlist}_HNSW32,{_code_name(index)}"'
    )


def _transformed_like(index: Any, dim: int) -> Any:
    faiss = _faiss()
    pq = _pq_behind(index)
    chain, made, width = transforms(index), [], dim
    for one in chain:
        made.append(_transform_like(one, width, pq if one is chain[-1] else None, name(index)))
        width = made[-1].d_out
    outer = faiss.IndexPreTransform(_owned(_like(within(index)[0][1], width)))
    for one in reversed(made):
        outer.prepend_transform(_owned(one))
    outer.own_fields = True
    return outer


def _transform_like(transform: Any, dim: int, pq: Any, called: str) -> Any:
    faiss = _faiss()
    this = kind(transform)
    if dim == transform.d_in:
        copy = faiss.VectorIOWriter()  # FAISS's own way to clone knows fewer kinds
        faiss.write_VectorTransform(transform, copy)
        reader = faiss.VectorIOReader()
        faiss.copy_array_to_vector(faiss.vector_to_array(copy.data), reader.data)
        return faiss.read_VectorTransform(reader)
    width = dim if transform.d_out == transform.d_in else transform.d_out
    if this == NORMALISING:
        return faiss.NormalizationTransform(dim, transform.norm)
    if this == "CenteringTransform":
        return faiss.CenteringTransform(dim)
    if this == "PCAMatrix" and width <= dim:
        return faiss.PCAMatrix(dim, width, transform.eigen_power, transform.random_rotation)
    if this == "RandomRotationMatrix":
        return faiss.RandomRotationMatrix(dim, width)
    if this == "HadamardRotation":
        return faiss.HadamardRotation(dim, transform.seed)
    if this == "RemapDimensionsTransform" and width >= dim and _pads(transform):
        return faiss.RemapDimensionsTransform(dim, width, False)
    if is_opq(transform, pq):
        _check_divides(pq.M, width, called)
        return faiss.OPQMatrix(dim, pq.M, width)
    raise StoreRejected(
        f"{_transform_name(transform, pq)} of {called} cannot be made for {dim} dimensions: choose an encoder with "
        f"{transform.d_in}, or build the index again without it"
    )


def _pads(transform: Any) -> bool:
    places = _faiss().vector_to_array(transform.map)
    return bool((places == np.where(np.arange(len(places)) < transform.d_in, np.arange(len(places)), -1)).all())


def _fitting_pq(index: Any, dim: int) -> Any:
    pq = product_quantizer(index)
    if pq is not None:
        _check_divides(pq.M, dim, name(index))
    return pq


def _check_divides(parts: int, dim: int, called: str) -> None:
    if dim % parts:
        raise StoreRejected(
            f"{called} cuts vectors into {parts} parts, which does not divide {dim}: choose another dimension for the "
            f"new encoder, for instance {dim - dim % parts or parts}"
        )


def _owned(made: Any) -> Any:
    """Hands a new object over to the C++ object that is made with it next."""
    made.this.disown()
    return made


# -- parameters -------------------------------------------------------------------------------------------------------

_CARRIED = (
    *("nprobe", "max_codes", "by_residual", "polysemous_ht", "scan_table_threshold", "search_type", "encode_signs"),
    *("efConstruction", "efSearch", "check_relative_distance", "search_bounded_queue", "search_method", "k_factor"),
    *("rangestat", "rangestat_arg", "qbs", "metric_arg", "norm", "epsilon", "balanced_bins"),
)
"""Parameters that constructors do not take, and that may be set at any time."""

_OF_CONTENT = {
    *("this", "thisown", "own_fields", "own_invlists", "own_refine_index", "verbose", "is_trained", "ntotal"),
    *("ntotal2", "M2", "entry_point", "max_level", "is_orthonormal", "have_bias", "use_precomputed_table"),
    *("id_map", "rev_map"),
    *("d", "d_in", "d_out", "dsub", "code_size", "max_points_per_d", "norm_min", "norm_max"),
    "total_codebook_size",
}
"""Attributes that follow from the vectors or the dimension, or say who owns what."""

_NOT_IN_FILES = {
    *("do_polysemous_training", "quantizer_trains_alone", "parallel_mode", "implem", "skip", "qbs2", "train_type"),
    *("init_level0", "keep_max_size_level0", "use_visited_hashset", "is_similarity"),
}
"""Attributes that every reader of an index file finds at their defaults."""

_STRUCTURES = ("hnsw", "pq", "sq", "rq")


def settings(index: Any) -> dict[str, Any]:
    """Every parameter of an index and its parts, by a dotted name; nothing that depends on vectors or dimension."""
    found: dict[str, Any] = {}
    _collect(index, "", found)
    return found


def _collect(index: Any, prefix: str, found: dict[str, Any]) -> None:
    found[f"{prefix}kind"] = _same_word(kind(index))
    _collect_scalars(index, prefix, found)
    for word in _STRUCTURES:
        if hasattr(index, word):
            _collect_scalars(getattr(index, word), f"{prefix}{word}.", found)
    if kind(index) in HNSW:
        found[f"{prefix}hnsw.M"] = [index.hnsw.nb_neighbors(level) for level in (0, 1)]
    if kind(index) in IVF:
        found[f"{prefix}direct_map"] = index.direct_map.type
    if kind(index) == "IndexPreTransform":
        for number, one in enumerate(transforms(index)):
            found[f"{prefix}transform{number}.kind"] = _same_word(kind(one))
            _collect_scalars(one, f"{prefix}transform{number}.", found)
    for word, part in within(index):
        _collect(part, f"{prefix}{word}.", found)


def _collect_scalars(thing: Any, prefix: str, found: dict[str, Any]) -> None:
    for base in type(thing).__mro__:
        for word, attribute in vars(base).items():
            if isinstance(attribute, property) and word not in _OF_CONTENT and word not in _NOT_IN_FILES:
                value = getattr(thing, word)
                if isinstance(value, (bool, int, float, str)):
                    found[f"{prefix}{word}"] = value


def _same_word(word: str) -> str:
    """One word for classes that a file does not tell apart."""
    if word in FLAT:
        return "IndexFlat"
    return {"OPQMatrix": "LinearTransform", "IndexRefineFlat": "IndexRefine"}.get(word, word)


def _copy_settings(index: Any, made: Any) -> None:
    pairs = [(index, made)]
    pairs += [(getattr(index, word), getattr(made, word)) for word in ("hnsw", "sq") if hasattr(index, word)]
    if kind(index) == "IndexPreTransform":
        pairs += list(zip(transforms(index), transforms(made), strict=True))
    for source, target in pairs:
        for word in _CARRIED:
            if hasattr(source, word) and getattr(target, word) != getattr(source, word):
                setattr(target, word, getattr(source, word))
    if kind(index) in IVF:
        made.set_direct_map_type(index.direct_map.type)
    for (_, part), (_, made_part) in zip(within(index), within(made), strict=True):
        _copy_settings(part, made_part)


def _faiss() -> Any:
    """The library, untyped: its stubs know only the base class of all indexes."""
    import faiss

    return faiss
