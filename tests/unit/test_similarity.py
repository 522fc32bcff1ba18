from __future__ import annotations

import json
from collections.abc import Mapping
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.evaluation import similarity as module
from migrator.evaluation.similarity import (
    MIN_NEGATIVES,
    Pairs,
    Scores,
    Shift,
    draw_listed_pairs,
    draw_pairs,
    draw_tag_pairs,
    score_histograms,
    score_pairs,
    shift,
)


def known_shift(scores: Mapping[str, Scores]) -> Shift:
    """The shift, where there are negatives enough to know it."""
    found = shift(scores)
    assert found is not None
    return found


def as_sets(pairs: Pairs) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Positives and negatives; fails where a pair is drawn twice."""
    positives, negatives = (list(map(tuple, some.tolist())) for some in pairs)
    assert len(set(positives)) == len(positives)
    assert len(set(negatives)) == len(negatives)
    return set(positives), set(negatives)


@st.composite
def classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_queries, n_gallery = draw(st.integers(0, 6)), draw(st.integers(0, 8))
    query_codes = draw(hnp.arrays(np.int64, n_queries, elements=st.integers(-1, 3)))
    gallery_codes = draw(hnp.arrays(np.int64, n_gallery, elements=st.integers(-1, 3)))
    return query_codes, gallery_codes, draw(hnp.arrays(np.int64, n_queries, elements=st.integers(-1, n_gallery - 1)))


@settings(deadline=None)
@given(classes(), st.integers(0, 9))
def test_all_pairs_are_drawn_where_the_limit_allows_for_classes_and_for_lists(drawn, seed):
    query_codes, gallery_codes, own = drawn
    right: set[tuple[int, int]] = set()
    wrong: set[tuple[int, int]] = set()
    for query, code in enumerate(query_codes.tolist()):
        for row, other in enumerate(gallery_codes.tolist()):
            if row != own[query]:
                (right if code == other and code >= 0 else wrong).add((query, row))
    assert as_sets(draw_pairs(query_codes, gallery_codes, own=own, limit=2000, seed=seed)) == (right, wrong)
    listed = [
        {row: float(code == other and code >= 0) for row, other in enumerate(gallery_codes.tolist())}
        for code in query_codes.tolist()
    ]
    found = draw_listed_pairs(listed, len(gallery_codes), own=own, limit=2000, seed=seed)
    assert as_sets(found) == (right, wrong)


def test_a_limited_draw_is_even_and_the_same_for_the_same_seed():
    random = np.random.default_rng(0)
    query_codes, gallery_codes = random.integers(0, 5, 100), random.integers(-1, 5, 3000)
    own = np.arange(100)
    gallery_codes[:100] = query_codes
    pairs = draw_pairs(query_codes, gallery_codes, own=own, limit=4000, seed=1)
    positives, negatives = as_sets(pairs)
    assert len(negatives) == 4000
    assert 3900 < len(positives) <= 4000  # a few were queries with themselves
    assert all(query_codes[query] == gallery_codes[row] and query != row for query, row in positives)
    assert all(query_codes[query] != gallery_codes[row] for query, row in negatives)
    for some in pairs:
        assert np.abs(np.bincount(some[:, 0], minlength=100) - 40).max() < 35  # 40 a query, give or take
        assert abs(some[:, 1].mean() / 1500 - 1) < 0.1
    again, other = (draw_pairs(query_codes, gallery_codes, own=own, limit=4000, seed=seed) for seed in (1, 2))
    assert all(np.array_equal(*some) for some in zip(pairs, again, strict=True))
    assert not np.array_equal(pairs.negatives, other.negatives)


def test_a_limited_draw_from_lists():
    listed = [dict.fromkeys(range(query, 2000, 2), 1.0) for query in range(4)]
    positives, negatives = as_sets(draw_listed_pairs(listed, 2000, limit=1500))
    assert len(positives) == len(negatives) == 1500
    assert all(row in listed[query] for query, row in positives)
    assert not any(row in listed[query] for query, row in negatives)


def test_where_everything_is_relevant_there_are_no_negatives():
    assert len(draw_pairs(np.zeros(5, int), np.zeros(300, int), limit=100).negatives) == 0


@pytest.mark.parametrize("row", [-1, 3])
def test_listed_rows_must_be_rows_of_the_gallery(row):
    with pytest.raises(ValueError, match="from 0 to 2"):
        draw_listed_pairs([{row: 1.0}], 3)


def test_scores_are_inner_products_of_each_test_in_its_own_dimension():
    random = np.random.default_rng(1)
    tests = {
        "baseline": (random.normal(size=(4, 3)).astype(np.float32), random.normal(size=(6, 3)).astype(np.float32)),
        "self": (random.normal(size=(4, 5)).astype(np.float32), random.normal(size=(6, 5)).astype(np.float32)),
    }
    pairs = Pairs(np.array([[0, 5], [3, 1]]), np.empty((0, 2), np.int64))
    found = score_pairs(tests, pairs)
    for test, (queries, gallery) in tests.items():
        assert found[test].positives == pytest.approx([queries[0] @ gallery[5], queries[3] @ gallery[1]])
        assert found[test].negatives.shape == (0,)


def test_scores_that_are_not_finite_are_refused():
    queries, gallery = np.ones((1, 2), np.float32), np.array([[1, 1], [np.nan, 0]], np.float32)
    pairs = Pairs(np.array([[0, 0]]), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="test cross"):
        score_pairs({"cross": (queries, gallery)}, pairs)


def test_histograms_share_their_bins_and_count_every_pair():
    found = score_histograms(
        {
            "baseline": Scores(np.array([0.5, 1.0]), np.array([0.0, 0.1, 0.24])),
            "self": Scores(np.array([0.9]), np.array([0.6])),
        },
        bins=4,
    )
    assert found.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert json.loads(json.dumps(found.to_json())) == {
        "edges": [0, 0.25, 0.5, 0.75, 1],
        "tests": {
            "baseline": {"positives": [0, 0, 1, 1], "negatives": [3, 0, 0, 0]},
            "self": {"positives": [0, 0, 0, 1], "negatives": [0, 0, 1, 0]},
        },
    }


@pytest.mark.parametrize("values", [[], [0.7], [0.7, 0.7]])
def test_histograms_of_one_score_or_none(values):
    found = score_histograms({"baseline": Scores(np.array(values), np.empty(0))})
    assert np.isfinite(found.edges).all()
    assert (np.diff(found.edges) > 0).all()
    assert found.counts["baseline"][0].sum() == len(values)
    assert found.counts["baseline"][1].sum() == 0


def spread(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 2000)


TODAY = Scores(spread(0.5, 1), spread(-1, 1))  # the threshold is 0.98


def test_a_threshold_that_keeps_its_meaning_is_not_mentioned():
    found = known_shift(
        {"baseline": TODAY, "cross": TODAY, "self": TODAY, "reverse": Scores(TODAY.negatives, TODAY.positives)}
    )
    assert found.threshold == pytest.approx(0.981, abs=0.001)
    assert found.tests["baseline"] == found.tests["self"] == pytest.approx((0.0385, 0.01), abs=0.0005)
    assert found.tests["reverse"] == pytest.approx((0.01, 0.0385), abs=0.0005)
    assert found.sentence is None  # nobody asks by the reverse test
    assert json.loads(json.dumps(found.to_json()))["sentence"] is None


def test_a_threshold_that_shifts_both_ways():
    found = known_shift(
        {"baseline": TODAY, "cross": Scores(TODAY.positives, spread(-1, 1.2)), "self": Scores(*[spread(0, 0.9)] * 2)}
    )
    assert found.sentence == (
        "an application that accepts results from a score of 0.981 on lets 1.0 % of irrelevant pairs pass today and "
        "would "
        "let 10.0 % pass in the cross-test, less than 0.1 % after the backfill: set it again, and during the backfill "
        "choose it per stage"
    )
    assert found.to_json() == {
        "threshold": found.threshold,
        "tests": {test: {"positives": p, "negatives": n} for test, (p, n) in found.tests.items()},
        "sentence": found.sentence,
    }


def test_right_pairs_that_are_lost_are_told():
    today = Scores(spread(0.5, 1.5), TODAY.negatives)
    found = known_shift({"baseline": today, "cross": today, "self": Scores(spread(0.5, 1.1), TODAY.negatives)})
    assert found.sentence == (
        "an application that accepts results from a score of 0.981 on lets 1.0 % of irrelevant pairs pass today and "
        "would "
        "let 1.0 % pass in the cross-test, 1.0 % after the backfill; of relevant pairs 51.9 % pass today, 51.9 % in "
        "the "
        "cross-test, 19.9 % after the backfill: set it again as the backfill continues"
    )


def test_without_a_cross_test_queries_move_at_once():
    assert known_shift({"baseline": TODAY, "self": Scores(TODAY.positives, spread(-1, 2))}).sentence == (
        "an application that accepts results from a score of 0.981 on lets 1.0 % of irrelevant pairs pass today and "
        "would "
        "let 34.0 % pass after the backfill: set it again when queries move"
    )


@pytest.mark.parametrize(("share", "told"), [(0.030, False), (0.031, True), (0.0034, False), (0.0032, True)])
def test_three_times_as_often_or_a_third_matters(share, told):
    def negatives(passing: float) -> np.ndarray:
        return (np.arange(10_000) < round(passing * 10_000)).astype(np.float64)

    tests = {"baseline": Scores(np.ones(1), negatives(0.01)), "self": Scores(np.ones(1), negatives(share))}
    assert (known_shift(tests).sentence is not None) == told


@pytest.mark.parametrize(("positives", "told"), [(60, False), (61, True), (40, False), (39, True)])
def test_ten_points_of_the_right_pairs_matter(positives, told):
    def right(passing: int) -> np.ndarray:
        return (np.arange(100) < passing) * 2.0

    tests = {"baseline": Scores(right(50), TODAY.negatives), "cross": Scores(right(positives), TODAY.negatives)}
    assert (known_shift(tests).sentence is not None) == told


def test_too_few_negatives_say_nothing():
    assert shift({"baseline": Scores(np.ones(5), np.arange(MIN_NEGATIVES - 1.0))}) is None
    found = known_shift({"baseline": Scores(np.empty(0), np.arange(MIN_NEGATIVES + 0.0))})
    assert found.tests["baseline"] == (None, 0.01)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float64, st.integers(1, 400), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1)))
def test_the_threshold_is_the_highest_that_1_percent_of_the_negatives_reach(negatives):
    with patch.object(module, "MIN_NEGATIVES", 1), patch.object(module, "PASS_TODAY", 0.1):
        if len(negatives) < 10:
            return
        found = known_shift({"baseline": Scores(np.empty(0), negatives)})
    at_least = int(0.1 * len(negatives))
    assert (negatives >= found.threshold).sum() >= at_least
    assert (negatives > found.threshold).sum() < at_least


@given(
    queries=st.lists(st.lists(st.sampled_from("abc"), max_size=3, unique=True), max_size=5),
    items=st.lists(st.lists(st.sampled_from("abcd"), max_size=3, unique=True), max_size=6),
    seed=st.integers(0, 99),
)
def test_pairs_of_tags_are_those_that_share_one(queries: list[list[str]], items: list[list[str]], seed: int) -> None:
    own = np.random.default_rng(seed).integers(-1, max(1, len(items)), len(queries))
    pairs = draw_tag_pairs(queries, items, own=own, limit=2000, seed=seed)
    every = {(query, item) for query in range(len(queries)) for item in range(len(items)) if own[query] != item}
    right = {(query, item) for query, item in every if {*queries[query]} & {*items[item]}}
    assert as_sets(pairs) == (right, every - right)
