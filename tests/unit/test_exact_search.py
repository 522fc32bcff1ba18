from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.evaluation import exact_search
from migrator.evaluation.exact_search import mixtures, pair_scores, rank

# Small whole numbers: many ties, and inner products that are exact in float32 and float64.
INTEGERS = st.integers(-3, 3)


@st.composite
def searches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    n_queries, n_gallery, dim = draw(st.integers(0, 5)), draw(st.integers(0, 24)), draw(st.integers(1, 3))
    queries = draw(hnp.arrays(np.float32, (n_queries, dim), elements=INTEGERS))
    gallery = draw(hnp.arrays(np.float32, (n_gallery, dim), elements=INTEGERS))
    exclude = draw(hnp.arrays(np.int64, n_queries, elements=st.integers(-1, n_gallery - 1)))
    return queries, gallery, draw(st.sampled_from([1, 2, 3, 5, 30])), exclude


@contextmanager
def blocks(scores: int, queries: int = 2048, passing: int = 1 << 22) -> Iterator[None]:
    """Small blocks, as a large gallery has many of."""
    with patch.multiple(exact_search, _SCORES=scores, _QUERIES=queries, _PASSING=passing):
        yield


def plain_rank(queries: np.ndarray, gallery: np.ndarray, k: int, exclude: np.ndarray) -> list[list[int]]:
    rows = []
    for query, own in zip(queries.astype(np.float64), exclude, strict=True):
        scored = [(-float(query @ item), index) for index, item in enumerate(gallery) if index != own]
        best = [index for _, index in sorted(scored)][:k]
        rows.append(best + [-1] * (k - len(best)))
    return rows


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = random.standard_normal(shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(deadline=None)
@given(searches(), st.integers(1, 40), st.integers(1, 6), st.sampled_from([1, 7, 100]))
def test_rank_equals_a_plain_loop_whatever_the_blocks(search, scores, group, passing):
    queries, gallery, k, exclude = search
    with blocks(scores, group, passing):
        found = rank(queries, gallery, k, exclude=exclude)
    assert found.dtype == np.int32
    assert found.shape == (len(queries), k)
    assert found.tolist() == plain_rank(queries, gallery, k, exclude)


@settings(deadline=None)
@given(searches())
def test_a_query_never_finds_itself(search):
    queries, gallery, k, exclude = search
    found = rank(queries, gallery, k, exclude=exclude)
    assert not ((found == exclude[:, None]) & (exclude[:, None] >= 0)).any()


def test_rank_on_unit_vectors_equals_a_full_sort():
    random = np.random.default_rng(1)
    vectors = unit(random, 3000, 16)
    own = np.arange(50)
    scores = vectors[:50].astype(np.float64) @ vectors.T.astype(np.float64)
    scores[own, own] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    for per_block in (50 * 7, 50 * 100, 1 << 22):
        with blocks(per_block):
            assert np.array_equal(rank(vectors[:50], vectors, 20, exclude=own), expected)


@pytest.mark.parametrize("scale", [1, 2.0**-149])
def test_differences_below_float32_are_told_apart(scale):
    # Large numbers that cancel out take the small one's last bits with them, more in some rows than in others; and with
    # the smallest numbers of float32 each product loses some.
    random = np.random.default_rng(2)
    gallery: Any = np.zeros((2000, 64))
    gallery[:, 5], gallery[:, 40] = random.permutation(2000) / 8192, random.integers(0, 4096, 2000)
    gallery[:, 0], gallery[:, 63] = 9999 * random.random(2000), -gallery[:, 40]
    gallery[:, 31] = -gallery[:, 0]
    if scale < 1:
        gallery = random.integers(0, 100, (2000, 8)) * scale
    gallery = gallery.astype(np.float32)
    query = np.full((1, gallery.shape[1]), 1 if scale == 1 else 0.3, np.float32)
    best = np.argsort(-(gallery.astype(np.float64) @ query[0].astype(np.float64)), kind="stable")
    for k in range(1, 40):
        with blocks(64 * 40 * k):
            assert rank(query, gallery, k)[0].tolist() == best[:k].tolist()


def test_equal_vectors_tie_exactly_wherever_they_lie():
    random = np.random.default_rng(3)
    distinct = unit(random, 37, 50)
    copies = random.integers(0, 37, 1500)
    queries = unit(random, 6, 50)
    found = rank(queries, distinct[copies], 1500)
    for query, row in zip(queries, found, strict=True):
        best = np.argsort(-(distinct.astype(np.float64) @ query.astype(np.float64)), kind="stable")
        assert row.tolist() == [index for which in best for index in np.flatnonzero(copies == which)]


def test_a_gallery_of_nothing_but_ties_is_ranked_by_index_and_kept_small():
    queries, gallery = np.ones((3, 4), np.float32), np.ones((5000, 4), np.float32)
    most = 0

    def watched(queries, gallery, pairs):
        nonlocal most
        most = max(most, len(pairs))
        return pair_scores(queries, gallery, pairs)

    with blocks(12_000, passing=300), patch.object(exact_search, "pair_scores", watched):
        assert rank(queries, gallery, 10, exclude=np.array([-1, 0, 4])).tolist() == [
            list(range(10)),
            list(range(1, 11)),
            [0, 1, 2, 3, 5, 6, 7, 8, 9, 10],
        ]
    assert most < 1000  # pairs in memory at once, of 15,000


def test_rank_permutes_with_the_gallery():
    random = np.random.default_rng(2)
    queries, gallery = unit(random, 9, 33), unit(random, 1009, 33)
    order = random.permutation(len(gallery))
    with blocks(9 * 64):
        assert np.array_equal(order[rank(queries, gallery[order], 10)], rank(queries, gallery, 10))


def test_a_ranking_does_not_depend_on_who_else_asks():
    random = np.random.default_rng(4)
    queries, gallery = unit(random, 40, 33), np.repeat(unit(random, 300, 33), 2, axis=0)
    together = rank(queries, gallery, 15)
    assert np.array_equal(np.vstack([rank(queries[:1], gallery, 15), rank(queries[1:], gallery, 15)]), together)


@pytest.mark.parametrize("worst_first", [False, True])
def test_scores_that_rise_or_fall_along_the_gallery(worst_first):
    gallery = np.linspace(0, 1, 4001, dtype=np.float32)[:: 1 if worst_first else -1, None]
    with blocks(200):
        found = rank(np.ones((2, 1), np.float32), gallery, 5)
    assert found.tolist() == [[4000, 3999, 3998, 3997, 3996] if worst_first else [0, 1, 2, 3, 4]] * 2


def test_ties_go_to_the_lower_index_at_the_cut():
    gallery = np.array([[1], [2], [1], [2], [1]], dtype=np.float32)
    query = np.ones((1, 1), dtype=np.float32)
    assert rank(query, gallery, 3).tolist() == [[1, 3, 0]]
    assert rank(query, gallery, 7).tolist() == [[1, 3, 0, 2, 4, -1, -1]]


def test_tiny_and_large_numbers_are_ranked_too():
    steps = np.arange(1, 300, dtype=np.float32)[:, None]
    for scale in (1e-44, 1e-30, 1e15):
        gallery = steps * np.float32(scale)
        expected = np.argsort(-gallery[:, 0].astype(np.float64), kind="stable")[:10]
        with blocks(20):
            assert np.array_equal(rank(np.full((1, 1), 1e-10, np.float32), gallery, 10)[0], expected)


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "exclude"),
    [
        (np.zeros((2, 3)), np.zeros((4, 2)), 1, None),
        (np.zeros(3), np.zeros((4, 3)), 1, None),
        (np.full((1, 2), np.nan), np.zeros((4, 2)), 1, None),
        (np.full((1, 2), np.inf), np.ones((4, 2)), 1, None),
        (np.ones((1, 2)), np.full((1, 2), np.inf), 1, None),
        (np.ones((1, 2)), np.full((1, 2), -np.inf), 1, None),
        (np.ones((1, 2)), np.array([[0, 0], [np.nan, 0], [9, 9]]), 1, None),
        (np.full((1, 2), 1e30), np.full((1, 2), 1e30), 1, None),
        (np.zeros((1, 2)), np.zeros((4, 2)), 0, None),
        (np.zeros((1, 2)), np.zeros((4, 2)), 1, np.array([4])),
        (np.zeros((1, 2)), np.zeros((4, 2)), 1, np.array([-2])),
        (np.zeros((1, 2)), np.zeros((4, 2)), 1, np.array([0, 1])),
    ],
)
def test_rank_refuses_what_it_cannot_rank(queries, gallery, k, exclude):
    with pytest.raises(ValueError, match=r"must|finite"):
        rank(queries.astype(np.float32), gallery.astype(np.float32), k, exclude=exclude)


def test_numbers_that_are_not_finite_are_found_in_any_block():
    gallery = np.ones((1000, 2), np.float32)
    gallery[777, 1] = np.nan
    with blocks(10), pytest.raises(ValueError, match="not finite"):
        rank(np.ones((1, 2), np.float32), gallery, 3)
    queries = np.ones((50, 2), np.float32)
    queries[49, 0] = np.nan
    with blocks(100, queries=8), pytest.raises(ValueError, match="not finite"):
        rank(queries, np.ones((10, 2), np.float32), 3)


def test_vectors_may_be_read_only_and_lie_anyhow_in_memory():
    random = np.random.default_rng(5)
    queries, gallery = unit(random, 5, 8), unit(random, 200, 8)
    expected = rank(queries, gallery, 7)
    backwards, by_column = gallery[::-1], np.asfortranarray(gallery)
    by_column.setflags(write=False)
    assert np.array_equal(rank(queries, by_column, 7), expected)
    assert np.array_equal(199 - rank(queries, backwards, 7), expected)


@settings(deadline=None)
@given(searches(), st.data())
def test_mixtures_equal_searches_of_galleries_that_are_really_mixed(search, data):
    queries, gallery_old, k, exclude = search
    gallery_new = data.draw(hnp.arrays(np.float32, gallery_old.shape, elements=INTEGERS))
    order = np.array(data.draw(st.permutations(range(len(gallery_old)))), np.int64)
    shares = sorted(data.draw(st.lists(st.floats(0, 1), max_size=4)))
    with blocks(data.draw(st.integers(1, 40))):
        found = mixtures(queries, gallery_old, gallery_new, order, [0, *shares, 1], k, exclude=exclude)
    assert len(found) == len(shares) + 2
    for share, rows in zip([0, *shares, 1], found, strict=True):
        mixed = gallery_old.copy()
        done = order[: round(share * len(order))]
        mixed[done] = gallery_new[done]
        assert np.array_equal(rows, rank(queries, mixed, k, exclude=exclude))
    assert np.array_equal(found[0], rank(queries, gallery_old, k, exclude=exclude))
    assert np.array_equal(found[-1], rank(queries, gallery_new, k, exclude=exclude))


def test_mixtures_of_unit_vectors_with_copies_equal_real_ones_bit_for_bit():
    random = np.random.default_rng(6)
    gallery_old, gallery_new = (np.repeat(unit(random, 600, 40), 2, axis=0) for _ in range(2))
    queries, exclude, order = gallery_new[:30], np.arange(30), random.permutation(1200)
    shares = [0, 0.1, 0.5, 0.9, 1]
    with blocks(30 * 3):
        found = mixtures(queries, gallery_old, gallery_new, order, shares, 25, exclude=exclude)
    for share, rows in zip(shares, found, strict=True):
        mixed = gallery_old.copy()
        mixed[order[: round(share * 1200)]] = gallery_new[order[: round(share * 1200)]]
        assert np.array_equal(rows, rank(queries, mixed, 25, exclude=exclude))


def test_an_order_may_begin_and_end_as_if_its_rows_lay_side_by_side():
    gallery_new = np.array([0.3, 0, 0.2, 0, 0, 1], np.float32)[:, None]
    with blocks(3):
        found = mixtures(
            np.ones((1, 1), np.float32), gallery_new - 2, gallery_new, np.array([0, 5, 2, 1, 3, 4]), [0.5], 1
        )
    assert found[0].tolist() == [[5]]


def test_mixtures_pass_each_gallery_once():
    random = np.random.default_rng(7)
    old, new = (unit(random, 100, 8) for _ in range(2))
    searched = {id(gallery): 0 for gallery in (old, new)}
    search = exact_search._search

    def counted(queries, gallery, rows, *rest):
        searched[id(gallery)] += len(rows)
        return search(queries, gallery, rows, *rest)

    with patch.object(exact_search, "_search", counted):
        mixtures(old[:4], old, new, np.arange(100), [0, 0.25, 0.5, 0.75, 1], 3)
        assert list(searched.values()) == [100, 100]
        mixtures(old[:4], old, new, np.arange(100), [0.25, 0.5], 3)
        assert list(searched.values()) == [175, 150]  # what no mixture holds is not looked at


@pytest.mark.parametrize(
    ("order", "shares"),
    [
        ([0, 1], [0, 1]),
        ([0, 1, 1], [0, 1]),
        ([0, 1, 3], [0, 1]),
        ([-1, 0, 1], [0, 1]),
        ([0, 1, 2], [0.5, 0.2]),
        ([0, 1, 2], [-0.1]),
        ([0, 1, 2], [1.1]),
        ([0, 1, 2], [float("nan")]),
    ],
)
def test_mixtures_refuse_what_is_no_order_and_no_share(order, shares):
    vectors = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="must"):
        mixtures(vectors, vectors, vectors, np.array(order), shares, 1)


def test_mixtures_refuse_galleries_that_do_not_match():
    vectors = np.ones((3, 2), np.float32)
    for other in (vectors[:2], np.ones((3, 1), np.float32)):
        with pytest.raises(ValueError, match="must"):
            mixtures(vectors, vectors, other, np.arange(3), [0, 1], 1)


def test_pair_scores_by_hand_in_any_number_of_steps():
    queries = np.array([[1, 2], [0, 0.5]], np.float32)
    gallery = np.array([[1, 1], [4, -1], [2**-24, 1]], np.float32)
    pairs = np.array([[0, 0], [0, 1], [1, 1], [0, 2]])
    for numbers in (1, 4, 1 << 20):
        with patch.object(exact_search, "_PAIRS", numbers):
            assert pair_scores(queries, gallery, pairs).tolist() == [3, 2, -0.5, 2 + 2**-24]
    assert pair_scores(queries, gallery, np.empty((0, 2), np.int64)).shape == (0,)
