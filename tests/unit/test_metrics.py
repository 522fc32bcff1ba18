from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from migrator.verify import metrics
from migrator.verify.metrics import Relevance, parse_metric, relevance, summarise
from migrator.verify.ranking import rank


def test_relevance_by_hand():
    # Gallery labels: a b a c; the first query is gallery item 0 itself, the third has a label nobody has.
    ranking = np.array([[2, 1, -1], [1, 0, 3], [0, 1, 2]], dtype=np.int32)
    found = relevance(["a", "b", "z"], ["a", "b", "a", "c"], ranking, exclude=np.array([0, -1, -1]))
    assert found.hits.tolist() == [[True, False, False], [True, False, False], [False, False, False]]
    assert found.total.tolist() == [1, 1, 0]
    assert relevance(["a"], ["a", "b", "a"], np.array([[0, 1, 2]], np.int32)).total.tolist() == [2]


def test_labels_may_be_numbers_and_differ_from_their_text():
    ranking = np.array([[0, 1]], dtype=np.int32)
    assert relevance(np.array([7]), [7, "7"], ranking).hits.tolist() == [[True, False]]


def test_metrics_by_hand():
    # Hits at ranks 1 and 3 of 3 relevant items: AP@3 = (1/1 + 2/3) / 3, AP@2 = (1/1) / 2.
    hits, total = np.array([[True, False, True, False]]), np.array([3])
    assert metrics.average_precision_at_k(hits, total, 3) == pytest.approx([5 / 9])
    assert metrics.average_precision_at_k(hits, total, 2) == pytest.approx([1 / 2])
    assert metrics.average_precision_at_k(hits, np.array([1000]), 4) == pytest.approx([(1 + 2 / 3) / 4])
    assert metrics.precision_at_k(hits, total, 4) == pytest.approx([1 / 2])
    late = np.array([[False, True]])
    assert metrics.recall_at_k(late, np.array([1]), 1).tolist() == [0.0]
    assert metrics.recall_at_k(late, np.array([1]), 2).tolist() == [1.0]


def test_queries_without_relevant_items_are_left_out_and_counted():
    found = Relevance(np.array([[True], [False], [False]]), np.array([1, 0, 2]))
    for name in metrics.METRICS:
        summary = summarise(parse_metric(f"{name}@1").per_query(found))
        assert summary == (0.5, 2, 1)
    nothing = summarise(np.array([np.nan]))
    assert math.isnan(nothing.mean)
    assert nothing.queries == 0


@st.composite
def relevances(draw: st.DrawFn) -> tuple[Relevance, int]:
    n, width = draw(st.integers(0, 4)), draw(st.integers(1, 8))
    hits = draw(hnp.arrays(np.bool_, (n, width)))
    more = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 5)))
    return Relevance(hits, hits.sum(axis=1) + more), draw(st.integers(1, width))


def plain(name: str, hits: list[bool], total: int, k: int) -> float:
    if total == 0:
        return math.nan
    if name == "recall":
        return 1.0 if any(hits[:k]) else 0.0
    if name == "precision":
        return sum(hits[:k]) / k
    found, sum_of_precisions = 0, 0.0
    for position in range(1, k + 1):
        if hits[position - 1]:
            found += 1
            sum_of_precisions += found / position
    return sum_of_precisions / min(k, total)


@settings(deadline=None)
@given(relevances(), st.sampled_from(sorted(metrics.METRICS)))
def test_metrics_equal_plain_loops_and_lie_between_0_and_1(found_and_k, name):
    found, k = found_and_k
    values = parse_metric(f"{name}@{k}").per_query(found)
    expected = [plain(name, row, int(total), k) for row, total in zip(found.hits.tolist(), found.total, strict=True)]
    assert values == pytest.approx(expected, nan_ok=True)
    counted = values[~np.isnan(values)]
    assert ((counted >= 0) & (counted <= 1)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30))
def test_average_precision_equals_scikit_learn_over_the_whole_gallery(seed, size):
    random = np.random.default_rng(seed)
    gallery, query = random.normal(size=(size, 4)).astype(np.float32), random.normal(size=(1, 4)).astype(np.float32)
    labels = random.integers(0, 2, size)
    labels[0] = 1
    found = relevance([1], labels, rank(query, gallery, size))
    expected = average_precision_score(labels, (query @ gallery.T)[0])
    assert metrics.average_precision_at_k(*found, size)[0] == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_metrics_do_not_depend_on_the_order_of_the_gallery(seed):
    random = np.random.default_rng(seed)
    queries, gallery = random.normal(size=(6, 5)).astype(np.float32), random.normal(size=(25, 5)).astype(np.float32)
    query_labels, gallery_labels = random.integers(0, 3, 6), random.integers(0, 3, 25)
    order = random.permutation(25)
    for text in ("map@10", "recall@5", "precision@3"):
        metric = parse_metric(text)
        straight = metric.per_query(relevance(query_labels, gallery_labels, rank(queries, gallery, 10)))
        shuffled = metric.per_query(relevance(query_labels, gallery_labels[order], rank(queries, gallery[order], 10)))
        assert straight == pytest.approx(shuffled, nan_ok=True)


def test_metric_names():
    assert parse_metric("map@100") == ("map", 100)
    assert str(parse_metric("recall@1")) == "recall@1"
    with pytest.raises(ValueError, match=r'unknown metric "recal@1"; did you mean "recall@10"\?'):
        parse_metric("recal@1")
    for text in ("map", "map@0", "map@-1", "map@1e3", "", "ndcg@10", "map@100 "):
        with pytest.raises(ValueError, match="unknown metric"):
            parse_metric(text)
    with pytest.raises(ValueError, match="needs rankings of 5 answers"):
        parse_metric("map@5").per_query(Relevance(np.ones((1, 4), bool), np.array([4])))


def test_flips_by_hand():
    # Twice right to wrong, once wrong to right, right to right, wrong to wrong, and one without relevant items.
    total = np.array([1, 1, 1, 1, 1, 0])
    old = Relevance(np.array([[True], [True], [False], [True], [False], [False]]), total)
    new = Relevance(np.array([[False], [False], [True], [True], [False], [False]]), total)
    assert metrics.flips(old, new) == (0.4, 0.2)
    assert metrics.flips(old, old) == (0.0, 0.0)
    assert all(math.isnan(share) for share in metrics.flips(*[Relevance(np.zeros((1, 1), bool), np.zeros(1, int))] * 2))


def test_scores_of_compatibility_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    # One dataset: M(n, n) = 0.72, M(*, *) = 0.71, M(o, o) = 0.57, M(n, o) = 0.59.
    up, comp = sigmoid(0.01 / 0.71), sigmoid(0.02 / 0.14)
    assert metrics.p_up(0.72, 0.71) == pytest.approx(up)
    assert metrics.p_comp(0.59, 0.57, 0.71) == pytest.approx(comp)
    assert metrics.p_1(0.72, 0.59, 0.57, 0.71) == pytest.approx(2 * up * comp / (up + comp))
    # Two datasets, the second at parity in both terms.
    assert metrics.p_up([0.72, 0.5], [0.71, 0.5]) == pytest.approx((up + 0.5) / 2)
    assert metrics.p_comp([0.59, 0.3], [0.57, 0.3], [0.71, 0.5]) == pytest.approx((comp + 0.5) / 2)
    both = metrics.p_1([0.72, 0.5], [0.59, 0.3], [0.57, 0.3], [0.71, 0.5])
    assert both == pytest.approx((2 * up * comp / (up + comp) + 0.5) / 2)


def test_scores_of_compatibility_at_parity_and_where_undefined():
    assert metrics.p_up(0.7, 0.7) == metrics.p_comp(0.5, 0.5, 0.7) == metrics.p_1(0.7, 0.5, 0.5, 0.7) == 0.5
    assert metrics.p_comp(1.0, 0.5, 0.5 + 1e-9) == 1.0  # a tiny denominator must not overflow
    assert metrics.p_comp(0.0, 0.5, 0.5 + 1e-9) == 0.0
    with pytest.raises(ValueError, match="above 0"):
        metrics.p_up(0.1, 0.0)
    with pytest.raises(ValueError, match="better than the old"):
        metrics.p_comp(0.6, 0.7, 0.7)


def test_backfill_auc_by_hand():
    assert metrics.backfill_auc([0, 1], [0.4, 0.6]) == pytest.approx(0.5)
    assert metrics.backfill_auc([0, 0.25, 1], [0.2, 0.6, 0.6]) == pytest.approx(0.25 * 0.4 + 0.75 * 0.6)
    assert metrics.backfill_auc(np.linspace(0, 1, 11), np.full(11, 0.7)) == pytest.approx(0.7)
    for fractions, values in [
        ([0, 1], [1]),
        ([0, 0.5], [1, 1]),
        ([0, 0.5, 0.5, 1], [1] * 4),
        ([0], [1]),
        ([1, 0], [1, 1]),
    ]:
        with pytest.raises(ValueError, match="rise from 0 to 1"):
            metrics.backfill_auc(fractions, values)
