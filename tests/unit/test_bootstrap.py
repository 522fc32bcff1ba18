from __future__ import annotations

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.evaluation.bootstrap import (
    Interval,
    bootstrap,
    exact_share,
    interim_confidence,
    minimum_detectable,
    queries_needed,
)

NAN = float("nan")
VALUES = st.floats(-1, 1, width=32)


def interval_of(values, clusters=None, confidence=0.95, resamples=1000, seed=0) -> Interval:
    return bootstrap(
        np.asarray(values)[:, None], clusters, confidence=confidence, resamples=resamples, seed=seed
    ).interval(0)


def coverage(draw, *, trials: int, resamples: int, truth: float = 0.0, confidence: float = 0.95) -> float:
    """How often the interval of what `draw(random)` gives, values and clusters, holds the truth."""
    covered = 0
    for trial in range(trials):
        values, clusters = draw(np.random.default_rng(trial))
        interval = interval_of(values, clusters, confidence, resamples, seed=trial)
        covered += interval.low <= truth <= interval.high
    return covered / trials


# With 300 trials a share of 0.95 has a standard deviation of 1.3 points.


def test_the_interval_covers_the_true_mean_of_skewed_differences_as_often_as_it_says():
    # Skewed like differences of average precision: mostly small, some large; the mean is 0.05.
    def draw(random):
        return random.exponential(0.25, 150) - 0.2, None

    assert 0.92 <= coverage(draw, trials=300, resamples=600, truth=0.05) <= 0.98


@pytest.mark.parametrize("clusters", [2, 4, 10, 60])
def test_the_interval_covers_the_mean_over_classes_yet_to_come(clusters):
    def draw(random):
        sizes = random.integers(5, 16, clusters)
        of_class = np.repeat(np.arange(clusters), sizes)
        values = random.normal(0, 0.1, clusters)[of_class] + random.normal(0, 0.1, len(of_class))
        return values, of_class

    assert 0.91 <= coverage(draw, trials=300, resamples=600) <= 0.99
    # Taken for independent, so many queries seem to say far more than they do.
    assert coverage(lambda random: (draw(random)[0], None), trials=100, resamples=300) < 0.8


def test_a_later_look_covers_more_though_its_tail_is_thinner_than_the_resamples_show():
    def draw(random):
        return random.normal(0, 0.1, 15), None

    assert coverage(draw, trials=300, resamples=200, confidence=interim_confidence(0.95, 5)) >= 0.99


def test_the_interval_equals_that_of_scipy():
    values = np.random.default_rng(3).exponential(0.3, (1200, 1)) - 0.25
    ours = bootstrap(values, confidence=0.9, resamples=20_000, seed=0)
    theirs = scipy.stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1, batch=1000
    )
    error = theirs.standard_error
    assert ours.error[0] == pytest.approx(error, rel=0.02)
    assert ours.low[0] == pytest.approx(theirs.confidence_interval.low, abs=0.05 * error)
    assert ours.high[0] == pytest.approx(theirs.confidence_interval.high, abs=0.05 * error)
    assert ours.means[0] == pytest.approx(values.mean())


def test_the_error_is_that_of_the_cluster_means():
    random = np.random.default_rng(4)
    of_cluster = np.repeat(np.arange(12), 30)
    values = random.normal(size=12)[of_cluster] + random.normal(0, 0.5, 360)
    found = bootstrap(values[:, None], of_cluster, confidence=0.95, resamples=8000, seed=0)
    means = values.reshape(12, 30).mean(axis=1)
    assert found.error[0] == pytest.approx(means.std(ddof=1) / math.sqrt(12), rel=0.05)
    assert (found.queries[0], found.clusters[0]) == (360, 12)
    # The expanded percentiles are about where Student's t is.
    reach = scipy.stats.t.ppf(0.975, 11) * found.error[0]
    assert found.high[0] - found.means[0] == pytest.approx(reach, rel=0.15)


def test_a_mean_is_over_queries_however_many_a_cluster_has():
    found = bootstrap(
        np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([5, 5, 5, -7]), confidence=0.8, resamples=500, seed=0
    )
    assert found.means.tolist() == [0.75]
    assert 0 <= found.low[0] < 0.75 < found.high[0] <= 1


def test_a_column_counts_the_queries_that_it_has():
    random = np.random.default_rng(5)
    values = random.normal(0.2, 1, (900, 3))
    values[::3, 1] = NAN
    values[:, 2] = NAN
    clusters = np.arange(900) // 3 * 7
    found = bootstrap(values, clusters, confidence=0.95, resamples=4000, seed=0)
    counted = ~np.isnan(values[:, 1])
    alone = bootstrap(values[counted, 1:2], clusters[counted], confidence=0.95, resamples=4000, seed=9)
    assert found.queries.tolist() == [900, 600, 0]
    assert found.clusters.tolist() == [300, 300, 0]
    assert found.means[1] == pytest.approx(alone.means[0])
    assert found.interval(1) == pytest.approx(alone.interval(0), abs=0.1 * alone.error[0])
    assert np.isnan([found.means[2], found.error[2], *found.interval(2)]).all()


def test_queries_that_count_nowhere_change_nothing():
    values, clusters = np.random.default_rng(5).normal(size=(60, 2)), np.arange(60) % 7
    values[::4], values[1, 0] = NAN, NAN
    counted = ~np.isnan(values[:, 1])
    found, alone = (
        bootstrap(values[rows], clusters[rows], confidence=0.9, resamples=50, seed=0) for rows in (..., counted)
    )
    assert [found.interval(column) for column in (0, 1)] == [alone.interval(column) for column in (0, 1)]


def test_a_column_of_few_clusters_is_about_as_sure_as_these_clusters_alone():
    random = np.random.default_rng(6)
    clusters = np.repeat(np.arange(100), 5)
    values = np.stack([random.normal(size=500), random.normal(0, 1, 100)[clusters]], axis=1)
    values[clusters >= 8, 1] = NAN  # such as a segment: some resamples hold none of it
    found = bootstrap(values, clusters, confidence=0.95, resamples=4000, seed=0)
    alone = bootstrap(values[clusters < 8, 1:], clusters[clusters < 8], confidence=0.95, resamples=4000, seed=0)
    assert found.clusters.tolist() == [100, 8]
    assert found.means[1] == pytest.approx(alone.means[0])
    assert 0.9 < (found.high[1] - found.low[1]) / (alone.high[0] - alone.low[0]) < 1.4


def test_the_interval_widens_with_confidence():
    found = bootstrap(np.random.default_rng(7).normal(size=(40, 2)), confidence=0.9, resamples=500, seed=0)
    for column in range(2):
        assert found.interval(column) == found.interval(column, 0.9)
        assert found.interval(column)[1:] == (found.low[column], found.high[column])
        nested = [found.interval(column, confidence) for confidence in (0.5, 0.9, 0.99, 0.9999)]
        assert all(inner.low > outer.low and inner.high < outer.high for inner, outer in pairwise(nested))
    with pytest.raises(ValueError, match="between 0 and 1"):
        found.interval(0, 1.0)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(8).normal(size=40)
    first, again, other = (interval_of(values, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("differences", [[0.1] * 7, [-0.7] * 1000, [0.0] * 30])
@pytest.mark.parametrize("clustered", [False, True])
def test_equal_differences_give_a_point_without_rounding(differences, clustered):
    clusters = np.arange(len(differences)) % 3 if clustered else None
    assert interval_of(differences, clusters) == (differences[0],) * 3


@pytest.mark.parametrize(("values", "clusters"), [([0.3], None), ([0.3, 0.1], np.array([4, 4])), ([], None)])
def test_one_cluster_has_a_mean_and_no_interval(values, clusters):
    interval = interval_of(np.array(values, np.float64), clusters)
    assert interval.mean == pytest.approx(np.mean(values) if values else NAN, nan_ok=True)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize(
    ("values", "clusters"),
    [
        (np.array([[np.inf], [0.0]]), None),
        (np.array([[-np.inf], [0.0]]), None),
        (np.zeros(3), None),
        (np.zeros((3, 1)), np.zeros(2, np.int64)),
        (np.zeros((3, 1)), np.zeros((3, 1), np.int64)),
    ],
)
def test_what_has_no_mean_is_refused(values, clusters):
    with pytest.raises(ValueError, match=r"must be|finite"):
        bootstrap(values, clusters, confidence=0.95, resamples=100, seed=0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap(np.zeros((3, 1)), confidence=0.95, resamples=0, seed=0)


def test_memory_does_not_grow_with_resamples_times_queries():
    values = np.random.default_rng(8).normal(size=(10_000, 2))
    tracemalloc.start()
    bootstrap(values, confidence=0.95, resamples=500, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6  # all counts at once would be 40 MB as float64, the draws 40 MB more


@st.composite
def columns(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    n, m = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    values = draw(hnp.arrays(np.float64, (n, m), elements=VALUES | st.just(NAN)))
    return values, draw(st.none() | hnp.arrays(np.int64, n, elements=st.integers(-2, 3)))


@settings(deadline=None, max_examples=60)
@given(columns(), st.integers(0, 3))
def test_means_and_bounds_lie_within_the_data_and_in_order(data, seed):
    values, clusters = data
    found = bootstrap(values, clusters, confidence=0.9, resamples=50, seed=seed)
    for column, of in enumerate(values.T):
        counted = of[~np.isnan(of)]
        assert found.queries[column] == len(counted)
        if found.clusters[column] < 2:
            assert np.isnan(found.low[column])
            continue
        assert counted.min() <= found.low[column] <= found.high[column] <= counted.max()
        assert found.means[column] == pytest.approx(counted.mean(), abs=1e-12)
        assert found.error[column] >= 0


@settings(deadline=None, max_examples=60)
@given(columns(), st.floats(-3, 3, width=32), st.floats(0.125, 8, width=32), st.permutations(range(4)))
def test_intervals_move_with_shift_scale_and_the_order_of_columns(data, shift, scale, order):
    values, clusters = data
    order = [column for column in order if column < values.shape[1]]
    plain = bootstrap(values, clusters, confidence=0.9, resamples=50, seed=1)
    moved = bootstrap((shift + scale * values)[:, order], clusters, confidence=0.9, resamples=50, seed=1)
    assert moved.error == pytest.approx(scale * plain.error[order], nan_ok=True, abs=1e-9)
    for bounds in ("means", "low", "high"):
        expected = shift + scale * getattr(plain, bounds)[order]
        assert getattr(moved, bounds) == pytest.approx(expected, nan_ok=True, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(columns(), st.permutations(range(-2, 4)))
def test_the_names_of_clusters_do_not_matter(data, names):
    values, clusters = data
    if clusters is None:
        clusters = np.zeros(len(values), np.int64)
    # Renamed in the same order they are the same draws; in another order the same law, so the same means.
    plain, same, other = (
        bootstrap(values, renamed, confidence=0.9, resamples=50, seed=1)
        for renamed in (clusters, clusters * 5 + 11, np.array(names)[clusters + 2])
    )
    assert np.array_equal(plain.low, same.low, equal_nan=True)
    assert other.means == pytest.approx(plain.means, nan_ok=True)
    assert np.array_equal(other.clusters, plain.clusters)


@given(st.floats(0.5, 0.999), st.integers(1, 300))
def test_all_looks_together_err_no_more_than_agreed(confidence, looks):
    spendings = [1 - interim_confidence(confidence, look) for look in range(1, looks + 1)]
    assert sum(spendings) <= (1 - confidence) * (1 + 1e-9)
    assert all(later < earlier for earlier, later in pairwise(spendings))
    assert spendings[0] == pytest.approx((1 - confidence) / 2)


def test_a_look_is_counted_from_1():
    assert interim_confidence(0.95, 1) == pytest.approx(0.975)
    assert interim_confidence(0.95, 2) == pytest.approx(1 - 0.05 / 6)
    with pytest.raises(ValueError, match="counted from 1"):
        interim_confidence(0.95, 0)


def test_who_looks_until_it_passes_rarely_passes_by_luck():
    random = np.random.default_rng(9)
    lucky = {"spent": 0, "again and again": 0}
    for _ in range(150):  # no gain at all, and ten question sets, one after the other
        looks = [bootstrap(random.normal(size=(60, 1)), confidence=0.9, resamples=200, seed=0) for _ in range(10)]
        lucky["spent"] += any(
            drawn.interval(0, interim_confidence(0.9, 1 + look)).low > 0 for look, drawn in enumerate(looks)
        )
        lucky["again and again"] += any(drawn.low[0] > 0 for drawn in looks)
    assert lucky["spent"] / 150 <= 0.1
    assert lucky["again and again"] / 150 > 0.25


def test_the_detectable_difference_is_found_four_times_in_five():
    error = 0.1 / math.sqrt(200)
    assert minimum_detectable(error, 0.95) == pytest.approx((1.959964 + 0.841621) * error)
    assert minimum_detectable(error, 0.95, power=0.5) == pytest.approx(1.959964 * error)
    random, found = np.random.default_rng(10), 0
    for trial in range(200):
        interval = interval_of(random.normal(minimum_detectable(error, 0.95), 0.1, 200), resamples=300, seed=trial)
        found += interval.low > 0
    assert 0.7 < found / 200 < 0.9


def test_the_queries_needed_make_a_distance_detectable():
    error = 0.02
    needed = queries_needed(100, error, 0.01, 0.95)
    assert needed is not None
    assert minimum_detectable(error * math.sqrt(100 / needed), 0.95) <= 0.01
    assert minimum_detectable(error * math.sqrt(100 / (needed - 1)), 0.95) > 0.01
    assert queries_needed(100, error, -0.01, 0.95) == needed
    assert queries_needed(100, error, 0.0, 0.95) is None
    assert queries_needed(100, error, 0.0006, 0.95) == pytest.approx(100 * (2.801585 / 0.03) ** 2, rel=1e-4)
    assert queries_needed(100, error, 0.0005, 0.95) is None  # more than a million
    assert queries_needed(100, NAN, 0.01, 0.95) is None
    assert queries_needed(100, error, NAN, 0.95) is None
    assert queries_needed(100, 0.0, 0.01, 0.95) == 0


@given(st.integers(1, 500), st.data(), st.sampled_from([0.5, 0.9, 0.975, 0.9999]))
def test_the_interval_of_a_share_is_that_of_scipy(queries, data, confidence):
    cases = data.draw(st.integers(0, queries))
    theirs = scipy.stats.binomtest(cases, queries).proportion_ci(confidence, method="exact")
    assert exact_share(cases / queries, queries, confidence) == pytest.approx(
        (cases / queries, theirs.low, theirs.high), abs=1e-6
    )
