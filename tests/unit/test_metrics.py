from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, ndcg_score
from sklearn.preprocessing import MultiLabelBinarizer

from migrator import config
from migrator.evaluation import metrics
from migrator.evaluation.exact_search import rank
from migrator.evaluation.metrics import Relevance, graded_relevance, parse_metric, relevance, summarise, tag_relevance


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


TAGS = st.lists(st.lists(st.sampled_from("abcd"), max_size=3, unique=True), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(TAGS, TAGS, st.integers(0, 99), st.integers(1, 9))
def test_shared_tags_make_an_item_relevant(queries, items, seed, cells):
    random = np.random.default_rng(seed)
    ranking = np.stack([np.append(random.permutation(len(items)), -1) for _ in queries])
    own = random.integers(-1, len(items), len(queries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CELLS", cells)  # so that queries are compared in several blocks
        found = tag_relevance(queries, items, ranking, exclude=own)
    binarizer = MultiLabelBinarizer(classes=list("abcd"))
    shared = binarizer.fit_transform(queries) @ binarizer.transform(items).T > 0
    shared[np.arange(len(queries))[own >= 0], own[own >= 0]] = False
    assert found.total.tolist() == shared.sum(axis=1).tolist()
    assert found.hits[:, :-1].tolist() == np.take_along_axis(shared, ranking[:, :-1], axis=1).tolist()
    assert not found.hits[:, -1].any(), "the padding"


def test_one_tag_each_is_a_label():
    random = np.random.default_rng(0)
    queries, items = (random.choice(list("abc"), n).tolist() for n in (20, 30))
    ranking, own = random.integers(-1, 30, (20, 10)), random.integers(-1, 30, 20)
    ranking[ranking == own[:, None]] = -1
    tags = tag_relevance([[tag] for tag in queries], [[tag] for tag in items], ranking, exclude=own)
    labels = relevance(queries, items, ranking, exclude=own)
    assert np.array_equal(tags.hits, labels.hits)
    assert np.array_equal(tags.total, labels.total)


def test_graded_relevance_by_hand():
    relevant = [{2: 3.0, 0: 1.0}, {}, {1: 0.0, 3: 2.0, 9: 4.0, 8: 5.0}]
    found = graded_relevance(relevant, np.array([[2, 1, -1], [0, 1, 2], [1, 3, 0]]))
    assert found.hits.tolist() == [[True, False, False], [False, False, False], [False, True, False]]
    assert found.total.tolist() == [2, 0, 3]
    assert found.grades is not None
    assert found.ideal is not None
    assert found.grades.tolist() == [[3, 0, 0], [0, 0, 0], [0, 2, 0]]
    assert found.ideal.tolist() == [[3, 1, 0], [0, 0, 0], [5, 4, 2]]


@pytest.mark.parametrize("relevant", [{-1: 1.0}, {0: -1.0}, {0: math.nan}, {0: math.inf}])
def test_rows_and_grades_that_cannot_be_are_refused(relevant):
    with pytest.raises(ValueError, match="gallery rows"):
        graded_relevance([{0: 1.0}, relevant], np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match="2 queries"):
        graded_relevance([{0: 1.0}] * 2, np.zeros((3, 1), np.int32))


@st.composite
def graded(draw: st.DrawFn) -> tuple[list[dict[int, float]], np.ndarray, int]:
    """Queries with what is relevant to them, rankings of a gallery with -1 at the end, and k."""
    n, gallery = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    width = draw(st.integers(1, 12))
    grades = st.dictionaries(st.integers(0, gallery + 2), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]))
    ranking = np.full((n, width), -1, np.int32)
    for row in ranking:
        best = draw(st.permutations(range(gallery)))[: draw(st.integers(0, width))]
        row[: len(best)] = best
    return draw(st.lists(grades, min_size=n, max_size=n)), ranking, draw(st.integers(1, width))


@settings(deadline=None)
@given(graded())
def test_graded_relevance_equals_a_plain_loop(case):
    relevant, ranking, _ = case
    found = graded_relevance(relevant, ranking)
    assert found.grades is not None
    assert found.ideal is not None
    assert found.grades.tolist() == [
        [of.get(answer, 0) for answer in row] for of, row in zip(relevant, ranking.tolist(), strict=True)
    ]
    assert np.array_equal(found.hits, found.grades > 0)
    assert found.total.tolist() == [sum(grade > 0 for grade in of.values()) for of in relevant]
    for of, ideal in zip(relevant, found.ideal.tolist(), strict=True):
        assert ideal == (sorted(of.values(), reverse=True) + [0.0] * ranking.shape[1])[: ranking.shape[1]]


def test_metrics_by_hand():
    # Hits at ranks 1 and 3 of 3 relevant items: AP@3 = (1/1 + 2/3) / 3, AP@2 = (1/1) / 2.
    hits, total = np.array([[True, False, True, False]]), np.array([3])
    found = Relevance(hits, total)
    assert metrics.average_precision_at_k(found, 3) == pytest.approx([5 / 9])
    assert metrics.average_precision_at_k(found, 2) == pytest.approx([1 / 2])
    assert metrics.average_precision_at_k(Relevance(hits, np.array([1000])), 4) == pytest.approx([(1 + 2 / 3) / 4])
    assert metrics.precision_at_k(found, 4) == pytest.approx([1 / 2])
    # The discounts of ranks 1, 2, 3 are 1, 1 / log2(3), 1 / 2.
    assert metrics.ndcg_at_k(found, 4) == pytest.approx([1.5 / (1.5 + 1 / math.log2(3))])
    assert metrics.ndcg_at_k(found, 2) == pytest.approx([1 / (1 + 1 / math.log2(3))])
    assert metrics.reciprocal_rank_at_k(found, 1).tolist() == [1.0]
    late = Relevance(np.array([[False, False, True]]), np.array([1]))
    assert metrics.recall_at_k(late, 2).tolist() == [0.0]
    assert metrics.recall_at_k(late, 3).tolist() == [1.0]
    assert metrics.reciprocal_rank_at_k(late, 2).tolist() == [0.0]
    assert metrics.reciprocal_rank_at_k(late, 3) == pytest.approx([1 / 3])


def test_graded_ndcg_by_hand():
    # Grades 3, 2, 1; answered 2, 0, 3. The gain is the grade itself, not 2 to its power.
    found = graded_relevance([{0: 3.0, 1: 2.0, 2: 1.0}], np.array([[1, 7, 0, -1]]))
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert metrics.ndcg_at_k(found, 3) == pytest.approx([(2 + 3 / 2) / ideal])
    assert metrics.ndcg_at_k(found, 1) == pytest.approx([2 / 3])
    assert metrics.ndcg_at_k(found, 4) == metrics.ndcg_at_k(found, 3)
    assert metrics.recall_at_k(found, 1).tolist() == [1.0]  # any grade is a hit


def test_the_metrics_are_those_of_the_configuration():
    assert tuple(metrics.METRICS) == config.METRICS


def test_queries_without_relevant_items_are_left_out_and_counted():
    found = Relevance(np.array([[True], [False], [False]]), np.array([1, 0, 2]))
    with_grades = graded_relevance([{0: 2.0}, {3: 0.0}, {1: 1.0, 2: 1.0}], np.array([[0], [0], [0]]))
    for name in metrics.METRICS:
        for answers in (found, with_grades):
            summary = summarise(parse_metric(f"{name}@1").per_query(answers))
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


def plain(name: str, gains: list[float], grades: list[float], k: int) -> float:
    """`gains` of the answers in order, `grades` of all relevant items."""
    total, hits = len(grades), [gain > 0 for gain in gains]
    if total == 0:
        return math.nan
    if name == "recall":
        return 1.0 if any(hits[:k]) else 0.0
    if name == "precision":
        return sum(hits[:k]) / k
    if name == "mrr":
        return next((1 / position for position in range(1, k + 1) if hits[position - 1]), 0.0)
    if name == "ndcg":
        reached, best = (
            sum(gain / math.log2(position + 1) for position, gain in enumerate(of[:k], start=1))
            for of in (gains, sorted(grades, reverse=True))
        )
        return reached / best
    found, sum_of_precisions = 0, 0.0
    for position in range(1, k + 1):
        if hits[position - 1]:
            found += 1
            sum_of_precisions += found / position
    return sum_of_precisions / min(k, total)


def check_against_plain_loop(name: str, found: Relevance, grades: list[list[float]], k: int) -> None:
    values = parse_metric(f"{name}@{k}").per_query(found)
    gains = found.hits.astype(float) if found.grades is None else found.grades
    expected = [plain(name, row, of, k) for row, of in zip(gains.tolist(), grades, strict=True)]
    assert values == pytest.approx(expected, nan_ok=True)
    counted = values[~np.isnan(values)]
    assert ((counted >= 0) & (counted <= 1)).all()
    assert summarise(values)[1:] == (int((found.total > 0).sum()), int((found.total == 0).sum()))


@settings(deadline=None)
@given(relevances(), st.sampled_from(sorted(metrics.METRICS)))
def test_metrics_equal_plain_loops_and_lie_between_0_and_1(found_and_k, name):
    found, k = found_and_k
    check_against_plain_loop(name, found, [[1.0] * int(total) for total in found.total], k)


@settings(deadline=None)
@given(graded(), st.sampled_from(sorted(metrics.METRICS)))
def test_graded_metrics_equal_plain_loops_and_lie_between_0_and_1(case, name):
    relevant, ranking, k = case
    grades = [[grade for grade in of.values() if grade > 0] for of in relevant]
    check_against_plain_loop(name, graded_relevance(relevant, ranking), grades, k)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=30), st.integers(1, 40))
def test_the_ideal_ranking_has_an_ndcg_of_exactly_1(grades, k):
    relevant = dict(enumerate(grades))
    best = sorted(relevant, key=relevant.__getitem__, reverse=True)
    ranking = np.array([(best + [-1] * k)[:k]])
    assert parse_metric(f"ndcg@{k}").per_query(graded_relevance([relevant], ranking)).tolist() == [1.0]
    same_class = relevance(["a"], ["a"] * len(grades), ranking)
    assert parse_metric(f"ndcg@{k}").per_query(same_class).tolist() == [1.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 40), st.booleans())
def test_ndcg_equals_scikit_learn(seed, size, k, binary):
    random = np.random.default_rng(seed)
    scores, grades = random.normal(size=(3, size)), random.integers(0, 2 if binary else 5, (3, size))
    grades[:, 0] = 1
    ranking = np.full((3, max(k, size)), -1)
    ranking[:, :size] = np.argsort(-scores, axis=1)
    found = [graded_relevance([dict(enumerate(row)) for row in grades.tolist()], ranking)]
    if binary:
        found.append(Relevance(found[0].hits, found[0].total))
    expected = [ndcg_score(grades[[row]], scores[[row]], k=k) for row in range(3)]
    for answers in found:
        assert metrics.ndcg_at_k(answers, k) == pytest.approx(expected)


def test_metrics_equal_torchmetrics_where_its_definition_is_the_same():
    from migrator.trainer.torchvision_cpu import import_timm

    import_timm()  # torchvision, which torchmetrics loads, does not load by itself beside a torch for the CPU
    import torch
    from torchmetrics.functional import retrieval

    theirs = {
        "recall": retrieval.retrieval_hit_rate,
        "precision": retrieval.retrieval_precision,
        "mrr": retrieval.retrieval_reciprocal_rank,
        "ndcg": retrieval.retrieval_normalized_dcg,
        "map": retrieval.retrieval_average_precision,
    }
    random = np.random.default_rng(0)
    for _ in range(20):
        size = int(random.integers(3, 40))
        scores = torch.from_numpy(1.0 + random.permutation(size))  # it takes no answer with a score of 0 for relevant
        grades = random.integers(0, 4, size) * (random.uniform(size=size) < 0.3)
        grades[random.integers(size)] = 1
        found = graded_relevance([dict(enumerate(grades.tolist()))], np.argsort(-scores.numpy())[None])
        for name, of_theirs in theirs.items():
            # Its average precision at k is over the hits at k, ours over all that could be: the same for all answers.
            k = size if name == "map" else int(random.integers(1, size + 1))
            target = torch.from_numpy(grades if name == "ndcg" else grades > 0)
            value = parse_metric(f"{name}@{k}").per_query(found)[0]
            assert value == pytest.approx(float(of_theirs(scores, target, top_k=k)), abs=1e-6), name


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30))
def test_average_precision_equals_scikit_learn_over_the_whole_gallery(seed, size):
    random = np.random.default_rng(seed)
    gallery, query = random.normal(size=(size, 4)).astype(np.float32), random.normal(size=(1, 4)).astype(np.float32)
    labels = random.integers(0, 2, size)
    labels[0] = 1
    found = relevance([1], labels, rank(query, gallery, size))
    expected = average_precision_score(labels, (query @ gallery.T)[0])
    assert metrics.average_precision_at_k(found, size)[0] == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_metrics_do_not_depend_on_the_order_of_the_gallery(seed, k):
    random = np.random.default_rng(seed)
    queries, gallery = random.normal(size=(6, 5)).astype(np.float32), random.normal(size=(25, 5)).astype(np.float32)
    query_labels, gallery_labels = random.integers(0, 3, 6), random.integers(0, 3, 25)
    order = random.permutation(25)
    straight, shuffled = rank(queries, gallery, k), rank(queries, gallery[order], k)
    grades = [dict(enumerate(row)) for row in random.integers(0, 3, (6, 25)).tolist()]
    moved = [{place: of[int(row)] for place, row in enumerate(order)} for of in grades]
    for name in metrics.METRICS:
        metric = parse_metric(f"{name}@{k}")
        by_class = metric.per_query(relevance(query_labels, gallery_labels, straight))
        assert by_class == pytest.approx(
            metric.per_query(relevance(query_labels, gallery_labels[order], shuffled)), nan_ok=True
        )
        by_grade = metric.per_query(graded_relevance(grades, straight))
        assert by_grade == pytest.approx(metric.per_query(graded_relevance(moved, shuffled)), nan_ok=True)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 15))
def test_a_query_that_is_an_item_fares_as_if_the_item_were_not_there(seed, size, k):
    random = np.random.default_rng(seed)
    gallery = random.normal(size=(size, 4)).astype(np.float32)
    labels = random.integers(0, 3, size)
    own = random.integers(size)
    others = np.delete(np.arange(size), own)
    ranking = rank(gallery[[own]], gallery, k, exclude=np.array([own]))
    found = relevance(labels[[own]], labels, ranking, exclude=np.array([own]))
    alone = relevance(labels[[own]], labels[others], rank(gallery[[own]], gallery[others], k))
    assert found.hits.tolist() == alone.hits.tolist()
    assert found.total.tolist() == alone.total.tolist()
    for name in metrics.METRICS:
        value, expected = (parse_metric(f"{name}@{k}").per_query(answers)[0] for answers in (found, alone))
        assert value == pytest.approx(expected, nan_ok=True)


def test_metric_names():
    assert parse_metric("map@100") == ("map", 100)
    assert str(parse_metric("recall@1")) == "recall@1"
    with pytest.raises(ValueError, match=r'unknown metric "recal@1"; did you mean "recall@10"\?'):
        parse_metric("recal@1")
    for text in ("map", "map@0", "map@-1", "map@1e3", "", "ndgc@10", "map@100 "):
        with pytest.raises(ValueError, match="unknown metric"):
            parse_metric(text)
    with pytest.raises(ValueError, match="needs rankings of 5 answers"):
        parse_metric("map@5").per_query(Relevance(np.ones((1, 4), bool), np.array([4])))


def test_flips_by_hand():
    # Twice right to wrong, once wrong to right, right to right, wrong to wrong, and one without relevant items.
    total = np.array([1, 1, 1, 1, 1, 0])
    old = Relevance(np.array([[True], [True], [False], [True], [False], [False]]), total)
    new = Relevance(np.array([[False], [False], [True], [True], [False], [False]]), total)
    assert metrics.summarise(metrics.negative_flips(old, new)) == (0.4, 5, 1)
    assert metrics.summarise(metrics.positive_flips(old, new)) == (0.2, 5, 1)
    assert np.nansum(metrics.negative_flips(old, old)) == 0
    assert metrics.negative_flips(old, new) == pytest.approx([1, 1, 0, 0, 0, math.nan], nan_ok=True)
    assert metrics.positive_flips(old, new) == pytest.approx([0, 0, 1, 0, 0, math.nan], nan_ok=True)
    assert np.isnan(metrics.negative_flips(*[Relevance(np.zeros((1, 1), bool), np.zeros(1, int))] * 2)).all()


def test_overlap_by_hand():
    old = np.array([[1, 2, 3], [1, 2, 3], [4, 5, -1], [4, -1, -1], [-1, -1, -1]])
    new = np.array([[3, 1, 9], [2, 1, 0], [5, 4, -1], [4, 5, -1], [-1, -1, -1]])
    assert metrics.overlap_at_k(old, new, 3) == pytest.approx([2 / 3, 2 / 3, 1, 1 / 2, math.nan], nan_ok=True)
    assert metrics.overlap_at_k(old, new, 2) == pytest.approx([1 / 2, 1, 1, 1 / 2, math.nan], nan_ok=True)
    for others, k in ((new[:4], 3), (new, 4), (new, 0)):
        with pytest.raises(ValueError, match="same queries"):
            metrics.overlap_at_k(old, others, k)


@settings(deadline=None)
@given(graded(), st.integers(0, 100))
def test_overlap_equals_the_plain_sets_and_does_not_depend_on_the_order(case, seed):
    _, old, k = case
    new = np.random.default_rng(seed).permuted(old, axis=1)
    new = np.take_along_axis(new, np.argsort(new < 0, axis=1, kind="stable"), axis=1)  # the padding last
    expected = []
    for one, other in zip(old[:, :k].tolist(), new[:, :k].tolist(), strict=True):
        sets = [{answer for answer in row if answer >= 0} for row in (one, other)]
        expected.append(len(sets[0] & sets[1]) / len(sets[0]) if sets[0] else math.nan)
    assert metrics.overlap_at_k(old, new, k) == pytest.approx(expected, nan_ok=True)
    assert metrics.overlap_at_k(new, old, k) == pytest.approx(expected, nan_ok=True)
    whole = metrics.overlap_at_k(old, new, old.shape[1])
    assert (whole[~np.isnan(whole)] == 1).all()


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
    refused: list[tuple[list[float], list[float]]] = [
        ([0, 1], [1]),
        ([0, 0.5], [1, 1]),
        ([0, 0.5, 0.5, 1], [1] * 4),
        ([0], [1]),
        ([1, 0], [1, 1]),
    ]
    for fractions, values in refused:
        with pytest.raises(ValueError, match="rise from 0 to 1"):
            metrics.backfill_auc(fractions, values)
