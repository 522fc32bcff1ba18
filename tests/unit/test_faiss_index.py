"""Indexes in memory: checksums, what is understood and refused, replacing and rebuilding."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.adapters.base import StoreRejected
from migrator.adapters.faiss.index import Index, read_index, row_checksums

DIM = 16


untyped: Any = faiss
"""For what faiss's own type stubs leave out."""


def vectors(n: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def made(factory: str, n: int = 600, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    index = faiss.index_factory(DIM, factory, metric)
    index.train(vectors(max(n, 600)))
    if n:
        index.add_with_ids(vectors(n), np.arange(n)) if "IDMap" in factory else index.add(vectors(n))
    return index


def reread(index: Index) -> Index:
    """The index as its file gives it back."""
    buffer = io.BytesIO()
    index.write(buffer.write)
    buffer.seek(0)
    return read_index("index.faiss", buffer.read)


# -- checksums --------------------------------------------------------------------------------------------------------


def plain_checksum(row: np.ndarray) -> int:
    """The checksum word by word, in Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    total = 0
    for place, word in enumerate(row.astype("<f4").tobytes()[n : n + 4] for n in range(0, 4 * len(row), 4)):
        multiplier = mix((place + 1) * 0x9E3779B97F4A7C15 & mask) | 1
        total = (total + int.from_bytes(word, "little") * multiplier) & mask
    return mix((total + 0x9E3779B97F4A7C15) & mask)


floats = hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 9)), elements=st.floats(width=32))


@given(floats)
def test_checksums_are_those_of_a_plain_loop(rows: np.ndarray) -> None:
    assert row_checksums(rows).tolist() == [plain_checksum(row) for row in rows]


def test_checksums_are_the_same_for_ever() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert row_checksums(rows).tolist() == [1078516281911603471, 10761077041425175910]
    np.testing.assert_array_equal(row_checksums(np.asfortranarray(rows)), row_checksums(rows))


@given(st.integers(0, DIM * 32 - 1))
def test_every_bit_counts(bit: int) -> None:
    row = vectors(1)
    other = row.copy()
    other.view(np.uint32)[0, bit // 32] ^= np.uint32(1 << bit % 32)
    assert row_checksums(row) != row_checksums(other)


def test_checksums_of_many_rows_are_those_of_each() -> None:
    rows = np.random.default_rng(0).standard_normal((40_000, 3)).astype(np.float32)
    found = row_checksums(rows)
    np.testing.assert_array_equal(found[[0, 16_383, 16_384, 39_999]], row_checksums(rows[[0, 16_383, 16_384, 39_999]]))
    assert len(np.unique(found)) == len(rows)


# -- what is refused --------------------------------------------------------------------------------------------------


REFUSED = {
    "NSG8": "IndexNSGFlat",
    "LSHrt": "IndexLSH",
    "ITQ8,Flat": "ITQTransform,Flat",
    "RQ2x4": "IndexResidualQuantizer",
    "LSQ2x4": "IndexLocalSearchQuantizer",
    "IVF4,RQ2x4": "IndexIVFResidualQuantizer",
    "IVF4,FlatDedup": "IndexIVFFlatDedup",
    "IVF4,PQ4+4": "IndexIVFPQR",
    "IVF4,RaBitQ": "IndexIVFRaBitQ",
    "IDMap2,PCA8,NSG8": "IDMap2,PCA8,IndexNSGFlat",
    "MinMax,SQ8": "IndexRowwiseMinMax",
}


@pytest.mark.parametrize("factory", REFUSED)
def test_kinds_that_could_be_harmed_are_refused(factory: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_L2)
    with pytest.raises(StoreRejected, match=r"^here is \w.*, whose vectors cannot be replaced safely") as refusal:
        Index(index, "here")
    assert str(refusal.value).startswith(f"here is {REFUSED[factory]}, ")
    assert "\n" not in str(refusal.value)


def test_what_a_refusal_names_is_understood() -> None:
    with pytest.raises(StoreRejected) as refusal:
        Index(faiss.index_factory(DIM, "NSG8"), "here")
    words = "Flat, IVF, HNSW, SQ and PQ (also fast scan), behind OPQ, PCA, RR, L2norm or Pad"
    assert words in str(refusal.value)
    for leaf in ("Flat", "IVF4,Flat", "HNSW8", "SQ8", "PQ4x4np", "PQ4x4fs"):
        for front in ("", "OPQ4," if "PQ" in leaf else "", "PCA8,", "RR,", "L2norm,", "Pad32,", "IDMap2,"):
            for behind in ("", ",RFlat"):
                index = Index(made(front + leaf + behind, 0), "here")
                index.rebuild(vectors(0))
                assert reread(index).count == 0


def test_fast_scan_lists_are_read_only_through_a_refinement() -> None:
    with pytest.raises(StoreRejected, match=r'add a refinement \("IVF4,PQ4x4fs,RFlat"\)'):
        Index(made("IVF4,PQ4x4fs"), "here")
    index = reread(Index(made("IVF4,PQ4x4fs,RFlat"), "here"))
    np.testing.assert_array_equal(index.vectors(np.arange(600)), vectors(600))


def test_other_indexes_are_refused_with_their_reason() -> None:
    nested = faiss.IndexIDMap2(faiss.IndexIDMap(faiss.IndexFlatIP(DIM)))
    with pytest.raises(StoreRejected, match=r"^here is IDMap2,IDMap,Flat, whose"):
        Index(nested, "here")
    with pytest.raises(StoreRejected, match="metric"):
        Index(faiss.IndexFlat(DIM, faiss.METRIC_L1), "here")
    with pytest.raises(StoreRejected, match="small integers"):
        Index(faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit_direct), "here")


@pytest.mark.parametrize(("ids", "reason"), [([1, 2, 1], "FAISS id 1 more than once"), ([1, -1, 2], "FAISS id -1")])
def test_ids_that_are_no_names_are_refused(ids: list[int], reason: str) -> None:
    for index in (faiss.IndexIDMap2(faiss.IndexFlatIP(DIM)), made("IVF4,Flat", 0)):
        index.add_with_ids(vectors(3), np.array(ids))
        with pytest.raises(StoreRejected, match=reason):
            Index(index, "here")


def test_an_id_map_that_does_not_fit_its_lists_is_refused() -> None:
    mapped = faiss.IndexIDMap2(made("IVF4,Flat", 0))
    mapped.add_with_ids(vectors(3), np.array([7, 8, 9]))
    inner: Any = faiss.downcast_index(mapped.index)
    inner.remove_ids(np.array([1]))
    inner.add_with_ids(vectors(1), np.array([5]))
    with pytest.raises(StoreRejected, match="does not fit its lists"):
        Index(mapped, "here")


def test_lists_on_disk_are_refused(tmp_path: Path) -> None:
    index = made("IVF4,Flat", 0)
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(tmp_path / "lists"))
    index.replace_invlists(lists, False)
    index.add(vectors(20))
    with pytest.raises(StoreRejected, match=r"another file: copy them .*by faiss's index\.copy_subset_to$"):
        Index(index, "here")
    held = faiss.IndexIVFFlat(index.quantizer, DIM, index.nlist, index.metric_type)
    index.copy_subset_to(held, untyped.InvertedLists.SUBSET_TYPE_ID_RANGE, 0, 20)
    assert reread(Index(held, "here")).count == 20


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "IDMap2,SQ8"])
def test_a_file_cut_anywhere_is_refused(factory: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors(100))
    index.add_with_ids(vectors(30), np.arange(30)) if "IDMap" in factory else index.add(vectors(30))
    content = faiss.serialize_index(index).tobytes()
    for length in [0, 3, 4, 20, 40, *range(60, len(content), 397), len(content) - 1]:
        with pytest.raises(StoreRejected, match=r"^gallery/index.faiss cannot be read as a FAISS index") as refusal:
            read_index("gallery/index.faiss", io.BytesIO(content[:length]).read)
        assert "\n" not in str(refusal.value)
    assert read_index("", io.BytesIO(content).read).count == 30


# -- replacing and rebuilding -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_replacing_changes_these_vectors_and_no_other(data: st.DataObject) -> None:
    factory = data.draw(st.sampled_from(["Flat", "IDMap2,Flat", "IVF4,Flat", "IDMap,IVF4,Flat"]))
    index = faiss.index_factory(DIM, factory, faiss.METRIC_L2)
    index.train(vectors(200))
    labels = np.array(data.draw(st.lists(st.integers(0, 2**62), unique=True, min_size=1, max_size=40)))
    content = vectors(len(labels))
    if factory == "Flat":
        labels = np.arange(len(labels))
        index.add(content)
    else:
        index.add_with_ids(content, labels)
    under_test = Index(index, "here")
    order = [labels.tolist().index(label) for label in under_test.labels.tolist()]
    np.testing.assert_array_equal(under_test.vectors(np.arange(len(labels))), content[order])
    for seed in (1, 2):
        rows = np.array(data.draw(st.lists(st.integers(0, len(labels) - 1), unique=True)), np.int64)
        content[rows] = vectors(len(labels), seed)[rows]
        positions = np.array([order.index(row) for row in rows], np.int64)
        under_test.replace(positions, content[rows])
        for one in (under_test, reread(under_test)):
            np.testing.assert_array_equal(one.labels, labels[order])
            np.testing.assert_array_equal(one.vectors(np.arange(len(labels))), content[order])
            np.testing.assert_array_equal(one.checksums, row_checksums(content[order]))
            scores, found = one.search(content, 1, exact=True)
            np.testing.assert_array_equal(found[:, 0], labels)
            np.testing.assert_allclose(scores, 0, atol=1e-5)


def test_a_replaced_vector_is_found_in_the_list_nearest_to_it() -> None:
    index = Index(made("IVF16,Flat"), "here")
    new = vectors(600, seed=1)
    index.replace(np.arange(600), new)
    assert index._leaf.nprobe == 1
    np.testing.assert_array_equal(index.search(new, 1, exact=False)[1][:, 0], np.arange(600))


@pytest.mark.parametrize("kind", [untyped.DirectMap.NoMap, untyped.DirectMap.Array, untyped.DirectMap.Hashtable])
def test_the_users_table_of_places_stays_and_is_right(kind: int) -> None:
    raw = made("IVF4,Flat", 50)
    raw.set_direct_map_type(kind)
    index = reread(Index(raw, "here"))
    new = vectors(10, seed=1)
    index.replace(np.arange(10), new)
    np.testing.assert_array_equal(index.vectors(np.arange(50)), [*new, *vectors(50)[10:]])
    buffer = io.BytesIO()
    index.write(buffer.write)
    buffer.seek(0)
    written = untyped.read_index(untyped.PyCallbackIOReader(buffer.read))
    assert written.direct_map.type == kind
    if kind == untyped.DirectMap.Array:
        np.testing.assert_array_equal(written.reconstruct(3), new[3])


REBUILT = [
    "IVF16,Flat",
    "HNSW8",
    "HNSW8_SQ8",
    "SQ8",
    "SQfp16",
    "PQ8x6np",
    "IVF16,SQ8",
    "IVF16,PQ8x6np",
    "HNSW8_PQ8x6np",
]


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize("factory", REBUILT)
def test_a_rebuilt_index_is_as_good_as_a_new_one(factory: str, metric: int) -> None:
    """The new vectors lie elsewhere and are far shorter: what was learnt from the old ones would not do."""
    new: Any = 0.05 * vectors(600, seed=1) + 0.1
    fresh: Any = faiss.index_factory(DIM, factory, metric)
    fresh.train(new)
    fresh.add(new)
    raw = made(factory, metric=metric)
    if factory.startswith("IVF"):
        raw.nprobe = fresh.nprobe = 4
    index = Index(raw, "here")
    index.rebuild(new)
    queries: Any = new[::3] + 0.005 * vectors(200, seed=2)
    truth = faiss.knn(queries, new, 5, metric=metric)[1]

    def recall(found: np.ndarray) -> float:
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, truth, strict=True)]))

    again = reread(index)
    assert recall(again.search(queries, 5, exact=False)[1]) >= recall(fresh.search(queries, 5)[1]) - 0.1
    error = np.linalg.norm(again.vectors(np.arange(600)) - new, axis=1).mean()
    assert error <= 1.05 * np.linalg.norm(_reconstructed(fresh) - new, axis=1).mean() + 1e-7
    np.testing.assert_array_equal(again.checksums, index.checksums)


def _reconstructed(index: Any) -> np.ndarray:
    return np.asarray(index.reconstruct_n(0, index.ntotal))


def test_a_rebuild_keeps_the_parameters() -> None:
    hnsw = made("HNSW12")
    hnsw.hnsw.efConstruction, hnsw.hnsw.efSearch = 57, 33
    index = Index(hnsw, "here")
    assert index.description == "HNSW12,Flat (efConstruction=57, efSearch=33)"
    index.rebuild(vectors(600, seed=1))
    again = reread(index)
    inner = again._leaf  # it lives as long as `again`
    assert (inner.hnsw.nb_neighbors(1), inner.hnsw.efConstruction, inner.hnsw.efSearch) == (12, 57, 33)
    ivf = made("IVF16,PQ4x4np")
    ivf.nprobe = 7
    index = Index(ivf, "here")
    assert index.description == "IVF16,PQ4x4 (nprobe=7)"
    index.rebuild(vectors(600, seed=1))
    again = reread(index)
    inner = again._leaf
    assert (inner.nlist, inner.nprobe, inner.pq.M, inner.pq.nbits) == (16, 7, 4, 4)


@pytest.mark.parametrize("factory", ["PQ4x8np", "IVF16,Flat", "IVF4,PQ4x8np", "HNSW8_PQ4x8np"])
def test_too_few_vectors_to_learn_from_keep_what_was_learnt(factory: str) -> None:
    index = Index(made(factory, 9), "here")
    new = vectors(600)[20:29]  # among those that the index has learnt from
    index.rebuild(new)
    again = reread(index)
    assert again.count == 9
    assert np.linalg.norm(again.vectors(np.arange(9)) - new, axis=1).max() < 0.6


def test_a_polysemous_index_is_trained_as_one() -> None:
    raw: Any = faiss.IndexPQ(DIM, 4, 4, faiss.METRIC_L2)
    raw.train(vectors(300))
    raw.add(vectors(100))
    raw.search_type, raw.polysemous_ht = untyped.IndexPQ.ST_polysemous, 8
    index = reread(Index(raw, "here"))
    assert not index._leaf.do_polysemous_training
    index.rebuild(vectors(100, seed=1))
    assert index._leaf.do_polysemous_training
    again = reread(index)
    assert again._leaf.search_type == untyped.IndexPQ.ST_polysemous


def test_exact_search_goes_on_past_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrator.adapters.faiss.index.BLOCK", 64)
    for metric in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        index = Index(made("IVF4,Flat", metric=metric), "here")
        scores, labels = index.search(vectors(9, seed=3), 70, exact=True)
        truth, rows = faiss.knn(vectors(9, seed=3), vectors(600), 70, metric=metric)
        np.testing.assert_array_equal(labels, rows)
        np.testing.assert_allclose(scores, truth if metric == faiss.METRIC_INNER_PRODUCT else -truth, rtol=1e-5)


def test_vectors_that_are_not_finite_never_answer() -> None:
    content = vectors(5)
    content[2] = np.nan
    flat = faiss.IndexFlatIP(DIM)
    flat.add(content)
    _, labels = Index(flat, "here").search(vectors(1), 5, exact=True)
    assert 2 not in labels
    assert set(labels[0].tolist()) == {0, 1, 3, 4, -1}
