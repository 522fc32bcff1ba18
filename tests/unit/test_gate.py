from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.config import Gate
from migrator.verify.gate import gate, paired_bootstrap

QUICK = Gate(min_queries=10, resamples=200)
VALUES = st.floats(0, 1, width=32)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(5)
    trials, covered = 400, 0
    for trial in range(trials):
        # Skewed like differences of average precision: mostly small, some large; the mean is 0.05.
        differences = random.exponential(0.25, 150) - 0.2
        interval = paired_bootstrap(differences, confidence=0.95, resamples=1000, seed=trial)
        covered += interval.low <= 0.05 <= interval.high
    # At 95 % of 400 trials the share has a standard deviation of 1.1 points; percentile intervals run slightly short.
    assert 0.91 <= covered / trials <= 0.98


def test_the_interval_widens_with_confidence_and_matches_the_normal_one():
    differences = np.random.default_rng(6).normal(0.1, 0.3, 2000)
    narrow = paired_bootstrap(differences, confidence=0.8, resamples=4000, seed=0)
    wide = paired_bootstrap(differences, confidence=0.99, resamples=4000, seed=0)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    error = differences.std() / np.sqrt(2000)
    assert narrow.high - narrow.mean == pytest.approx(1.2816 * error, rel=0.1)
    assert narrow.mean == pytest.approx(differences.mean())


def test_the_same_seed_gives_the_same_interval():
    differences = np.random.default_rng(7).normal(size=40)
    first, again, other = (paired_bootstrap(differences, confidence=0.9, resamples=300, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("differences", [[0.3], [0.1] * 7, [-0.7] * 1000, [0.0] * 30])
def test_equal_differences_give_a_point_without_rounding(differences):
    interval = paired_bootstrap(np.array(differences), confidence=0.95, resamples=100, seed=0)
    assert interval == (differences[0],) * 3


@pytest.mark.parametrize("differences", [np.array([]), np.array([0.1, np.nan]), np.array([np.inf]), np.zeros((2, 2))])
def test_the_bootstrap_refuses_what_has_no_mean(differences):
    with pytest.raises(ValueError, match="row of finite differences"):
        paired_bootstrap(differences, confidence=0.95, resamples=100, seed=0)


def test_memory_does_not_grow_with_resamples_times_queries():
    differences = np.random.default_rng(8).normal(size=10_000)
    tracemalloc.start()
    paired_bootstrap(differences, confidence=0.95, resamples=2_000, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6  # all indices at once would be 80 MB as int32, the values 160 MB more


def row(mean: float, spread: float, n: int) -> np.ndarray:
    """n values of exactly this mean, half above and half below by `spread`."""
    return mean + spread * np.where(np.arange(n) % 2, 1, -1)


@pytest.mark.parametrize(
    ("new", "changes", "outcome", "reason"),
    [
        (
            row(0.20, 0.1, 100),
            {},
            "pass",
            r"map@100 gain \+0\.2000, between \+0\.1.* at 0\.95 .* 100 queries: at least",
        ),
        (row(-0.20, 0.1, 100), {}, "fail", r"gain -0\.2000.*below \+0\.0000"),
        (row(0.01, 0.1, 100), {}, "inconclusive", r"about \d+ queries like these would decide"),
        (row(-0.01, 0.1, 100), {}, "inconclusive", r"about \d+ queries like these would decide"),
        (row(0.0, 0.1, 100), {}, "inconclusive", "too close to min_gain"),
        (np.zeros(100), {}, "pass", r"at least \+0\.0000"),
        (np.full(100, 0.1), {"min_gain": 0.1}, "pass", r"at least \+0\.1000"),
        (np.full(100, 0.1), {"min_gain": 0.1001}, "fail", "below"),
        (row(0.20, 0.1, 100), {"min_gain": 0.2}, "inconclusive", "both sides of"),
        (row(-0.01, 0.1, 100), {"min_gain": -0.05}, "pass", r"at least -0\.0500"),
        (row(0.20, 0.1, 29), {}, "inconclusive", "29 queries have relevant items, the gate needs 30"),
        (row(-0.20, 0.1, 3), {}, "inconclusive", "3 queries have relevant items"),
        (np.array([]), {}, "inconclusive", "0 queries"),
        (np.append(row(0.2, 0.1, 100), np.nan), {}, "inconclusive", "not a finite number"),
        (np.append(row(0.2, 0.1, 100), np.inf), {}, "inconclusive", "not a finite number"),
    ],
)
def test_the_gate_decides(new, changes, outcome, reason):
    verdict = gate(np.zeros(len(new)), new, Gate(resamples=2000, **changes))
    assert verdict.outcome == outcome
    assert re.search(reason, " ".join(verdict.reasons)), verdict.reasons
    assert verdict.queries == len(new)
    assert all("\n" not in line for line in verdict.reasons)


def test_the_gate_looks_at_pairs():
    # The queries differ far more among themselves than the systems do on each of them.
    old = np.random.default_rng(9).uniform(size=60)
    assert gate(old, old + row(0.02, 0.01, 60), Gate()).outcome == "pass"
    assert gate(old, np.roll(old, 1) + row(0.02, 0.01, 60), Gate()).outcome == "inconclusive"


def test_the_advised_number_of_queries_does_decide():
    verdict = gate(np.zeros(50), row(0.02, 0.1, 50), Gate())
    assert verdict.outcome == "inconclusive"
    advised = int(re.findall(r"about (\d+) queries", verdict.reasons[1])[0])
    assert 50 < advised < 200  # by the normal interval: (1.96 * 0.1 / 0.02) ** 2 = 96
    enough = 2 * round(advised * 0.6)  # a fifth more, and even: the estimate is rough
    assert gate(np.zeros(enough), row(0.02, 0.1, enough), Gate()).outcome == "pass"


def test_rows_of_different_queries_are_refused():
    with pytest.raises(ValueError, match="same queries"):
        gate(np.zeros(30), np.zeros(31), Gate())


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(0, 9), elements=VALUES | st.just(float("nan"))))
def test_too_little_data_never_passes_nor_fails(new):
    assert gate(np.zeros(len(new)), new, QUICK).outcome == "inconclusive"


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(10, 40), elements=VALUES), st.data())
def test_a_single_number_that_is_not_finite_never_passes(new, data):
    broken = new.copy()
    broken[data.draw(st.integers(0, len(new) - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert gate(np.zeros(len(new)), broken, QUICK).outcome == "inconclusive"
    assert gate(broken, new, QUICK).outcome == "inconclusive"


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float64, (2, 20), elements=VALUES),
    st.floats(0, 1, width=32),
    st.floats(-0.5, 0.5, width=32),
)
def test_the_better_the_new_values_the_better_the_verdict(rows, shift, min_gain):
    order = ["fail", "inconclusive", "pass"]
    old, new = rows
    wanted = QUICK.model_copy(update={"min_gain": min_gain})
    before, after = gate(old, new, wanted), gate(old, new + shift, wanted)
    if shift > 1e-9:  # below that the sums' rounding decides
        assert order.index(after.outcome) >= order.index(before.outcome)
    # The verdict is the interval's: never two at once.
    low, high = before.interval.low, before.interval.high
    assert low <= high
    assert (before.outcome == "pass") == (low >= min_gain)
    assert (before.outcome == "fail") == (high < min_gain)
