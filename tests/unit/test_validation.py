"""mAP and the score that chooses an epoch."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from migrator.trainer.training.validation import mean_average_precision, measure, score


def test_map_by_hand() -> None:
    gallery = np.array([[1, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]], np.float32)
    queries = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    labels = np.array([0, 1, 0, 1])
    # Ranks of the first query's hits: 1 and 3; of the second: 2 and 4. The third's label is not in the gallery.
    found = mean_average_precision(queries, gallery, np.array([0, 1, 2]), labels)
    assert found == pytest.approx(((1 / 1 + 2 / 3) / 2 + (1 / 2 + 2 / 4) / 2) / 2)
    at_one = mean_average_precision(queries[:2], gallery, np.array([0, 1]), labels, k=1)
    assert at_one == pytest.approx(0.5)
    assert mean_average_precision(queries, gallery, np.array([7, 8, 9]), labels) == 0


def test_map_agrees_with_scikit_learn_over_the_whole_gallery() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(n, 8)).astype(np.float32) for n in (300, 90))
    labels, gallery_labels = rng.integers(0, 5, 300), rng.integers(0, 5, 90)
    theirs = [
        average_precision_score(gallery_labels == label, gallery @ query)
        for query, label in zip(queries, labels, strict=True)
    ]
    found = mean_average_precision(queries, gallery, labels, gallery_labels)
    assert found == pytest.approx(np.mean(theirs), abs=1e-6)


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_map_of_the_k_best_is_that_of_a_whole_sort(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = (rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 30))
    labels, gallery_labels = rng.integers(0, 3, 5), rng.integers(0, 3, 30)
    expected = []
    for query, label in zip(queries, labels, strict=True):
        hits = (gallery_labels == label)[np.argsort(-(gallery @ query), kind="stable")]
        if hits.any():
            precisions = [hits[: i + 1].mean() for i in range(min(k, 30)) if hits[i]]
            expected.append(sum(precisions) / min(k, hits.sum()))
    found = mean_average_precision(queries, gallery, labels, gallery_labels, k=k)
    assert found == pytest.approx(np.mean(expected) if expected else 0)


def test_tests_of_two_spaces_of_other_lengths_compare_what_can_be_compared() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 1]), np.array([0, 1, 0])
    new = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    old = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    assert set(measure(new, None, labels)) == {"self"}
    assert set(measure(new, new, labels, reverse=True)) == {"self", "old", "cross", "reverse"}
    assert set(measure(new, old, labels, reverse=True)) == {"self", "old"}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_score_is_the_harmonic_mean_of_the_papers_two_terms() -> None:
    up, comp = sigmoid((0.7 - 0.8) / 0.8), sigmoid((0.6 - 0.5) / (0.8 - 0.5))
    measured = {"self": 0.7, "cross": 0.6, "old": 0.5}
    assert score(measured, upper_bound=0.8) == pytest.approx(2 / (1 / up + 1 / comp))
    assert score({"self": 0.8, "cross": 0.5, "old": 0.5}, upper_bound=0.8) == pytest.approx(0.5)


@pytest.mark.parametrize("bound", [None, 0.5, 0.3])
def test_score_without_a_usable_upper_bound_measures_by_the_old_encoder(bound: float | None) -> None:
    up, comp = sigmoid((0.7 - 0.5) / 0.5), sigmoid((0.6 - 0.5) / 0.5)
    assert score({"self": 0.7, "cross": 0.6, "old": 0.5}, bound) == pytest.approx(2 / (1 / up + 1 / comp))


@given(*[st.floats(0, 1)] * 3, st.none() | st.floats(0.01, 1))
def test_score_is_a_share_and_rises_with_either_test(new: float, cross: float, old: float, bound: float | None) -> None:
    here = score({"self": new, "cross": cross, "old": old}, bound)
    assert 0 <= here <= 1
    assert score({"self": min(1, new + 0.1), "cross": cross, "old": old}, bound) >= here
    assert score({"self": new, "cross": min(1, cross + 0.1), "old": old}, bound) >= here


def test_score_without_a_cross_test_is_the_self_test() -> None:
    assert score({"self": 0.7}, None) == 0.7
