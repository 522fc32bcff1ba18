from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from migrator.config import Gate, Threshold
from migrator.evaluation.bootstrap import bootstrap, interim_confidence
from migrator.evaluation.gate import Measured, Verdict, gate

MAP = "map@100"
QUICK = Gate(min_queries=10, resamples=200)
VALUES = st.floats(0, 1, width=32)
NAN = float("nan")


def asked(old: np.ndarray, new: np.ndarray, **others: Any) -> Measured:
    return Measured({MAP: old}, {MAP: new}, **others)


def row(mean: float, spread: float, n: int) -> np.ndarray:
    """n values of exactly this mean, half above and half below by `spread`."""
    return mean + spread * np.where(np.arange(n) % 2, 1, -1)


def share(ones: int, n: int) -> np.ndarray:
    return (np.arange(n) < ones).astype(np.float64)


def told(verdict: Verdict) -> str:
    assert verdict.reasons
    assert all("\n" not in reason for reason in verdict.reasons)
    return " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("new", "changes", "outcome", "reason"),
    [
        (
            row(0.20, 0.1, 100),
            {},
            "pass",
            r"^map@100 gain \+0\.2000, between \+0\.1\d+ and \+0\.2\d+ at 0\.975 confidence over 100 queries: at least",
        ),
        (row(-0.20, 0.1, 100), {}, "fail", r"gain -0\.2000.*below \+0\.0000"),
        (row(0.01, 0.1, 100), {}, "inconclusive", r"about \d+ queries like these would decide"),
        (row(-0.01, 0.1, 100), {}, "inconclusive", r"effect at 80 % power: 0\.03\d\d; about \d+ queries like these"),
        (row(0.0, 0.1, 100), {}, "inconclusive", "too close to min_gain"),
        (np.zeros(100), {}, "pass", r"at least \+0\.0000"),
        (np.full(100, 0.1), {"min_gain": 0.1}, "pass", r"at least \+0\.1000"),
        (np.full(100, 0.1), {"min_gain": 0.1001}, "fail", "below"),
        (row(0.20, 0.1, 100), {"min_gain": 0.2}, "inconclusive", "both sides of"),
        (row(-0.01, 0.1, 100), {"min_gain": -0.05}, "pass", r"at least -0\.0500"),
        (row(0.20, 0.1, 29), {}, "inconclusive", "29 queries have relevant items, the gate needs 30"),
        (row(-0.20, 0.1, 3), {}, "inconclusive", "3 queries have relevant items"),
        (np.array([]), {}, "inconclusive", "0 queries"),
        (np.append(row(0.2, 0.1, 99), np.nan), {}, "inconclusive", "of 1 queries is not a finite number for both"),
        (np.append(row(0.2, 0.1, 99), np.inf), {}, "inconclusive", "not a finite number"),
    ],
)
def test_the_first_bound_is_the_least_gain(new, changes, outcome, reason):
    verdict = gate(asked(np.zeros(len(new)), new), Gate(resamples=2000, **changes))
    assert verdict.outcome == outcome
    assert re.search(reason, told(verdict)), verdict.reasons
    if np.isfinite(new).all():
        assert verdict.queries == len(new)
    assert [finding.bound for finding in verdict.findings] == [f"gain >= {changes.get('min_gain', 0):g}"]
    assert (verdict.interval is None) == (verdict.findings[0].minimum_detectable is None)


@pytest.mark.parametrize(
    ("bound", "old", "new", "outcome", "reason"),
    [
        ({"min": 0.6}, row(0.9, 0.1, 100), row(0.7, 0.1, 100), "pass", r"ndcg@10 0\.7000, between.*at least 0\.6000"),
        ({"min": 0.8}, row(0.2, 0.1, 100), row(0.7, 0.1, 100), "fail", r"below 0\.8000"),
        ({"min": 0.71}, row(0.2, 0.1, 100), row(0.7, 0.1, 100), "inconclusive", r"both sides of 0\.7100"),
        ({"max": 0.8}, row(0.2, 0.1, 100), row(0.7, 0.1, 100), "pass", r"at most 0\.8000"),
        ({"max": 0.6}, row(0.9, 0.1, 100), row(0.7, 0.1, 100), "fail", r"above 0\.6000"),
        ({"max": 0.71}, row(0.9, 0.1, 100), row(0.7, 0.1, 100), "inconclusive", r"both sides of 0\.7100"),
        ({"min_gain": 0.1}, row(0.5, 0.3, 100), row(0.7, 0.2, 100), "pass", r"ndcg@10 gain \+0\.2000.*at least"),
        ({"min_gain": 0.3}, row(0.5, 0.3, 100), row(0.7, 0.2, 100), "fail", r"below \+0\.3000"),
        ({"min_gain": 0.21}, row(0.5, 0.3, 100), row(0.7, 0.2, 100), "inconclusive", "both sides"),
        ({"min_ratio": 0.9}, row(0.8, 0.1, 100), row(0.79, 0.1, 100), "pass", r"less 0\.9 of today's \+0\.0700"),
        ({"min_ratio": 0.9}, row(0.8, 0.1, 100), row(0.65, 0.1, 100), "fail", r"-0\.0700.*below \+0\.0000"),
        ({"min_ratio": 0.9}, row(0.8, 0.1, 100), row(0.721, 0.1, 100)[::-1], "inconclusive", "both sides"),
        ({"min_ratio": 1.1}, row(0.8, 0.1, 100), row(0.8, 0.1, 100), "fail", "less 1.1 of today's -0.0800"),
    ],
)
@pytest.mark.parametrize("segment", [None, "a"])
def test_every_bound_has_three_outcomes_overall_and_in_a_segment(bound, old, new, outcome, reason, segment):
    name = "ndcg@10"
    segments = None
    if segment is not None:  # all others would make it fail, or pass
        other = np.ones(300) if outcome != "pass" else np.zeros(300)
        other = 1 - other if "max" in bound else other
        old, new = np.append(old, np.full(300, 0.5)), np.append(new, other)
        segments = ["a"] * 100 + ["b"] * 300
    gains = np.ones(len(new))
    measured = Measured({MAP: 0 * gains, name: old}, {MAP: gains, name: new}, segments=segments)
    wanted = Gate(resamples=2000, thresholds=[Threshold(metric=name, segment=segment, **bound)])
    verdict = gate(measured, wanted)
    first, second = verdict.findings
    assert first.outcome == "pass"
    assert (second.outcome, second.segment, second.queries) == (outcome, segment, 100)
    assert re.search(reason, second.reason), second.reason
    assert second.reason.startswith("segment 'a': ") == (segment is not None)
    assert verdict.outcome == outcome
    assert second.reason in verdict.reasons


@pytest.mark.parametrize(
    ("flipped", "queries", "outcome"),
    [(0, 1000, "pass"), (0, 100, "inconclusive"), (3, 3000, "pass"), (100, 1000, "fail"), (20, 1000, "inconclusive")],
)
def test_negative_flips_are_bounded_from_above_and_few_queries_without_any_prove_little(flipped, queries, outcome):
    flips = share(flipped, queries)
    measured = Measured({MAP: np.zeros(queries)}, {MAP: np.zeros(queries), "negative_flips": flips})
    verdict = gate(measured, Gate(resamples=2000, thresholds=[Threshold(metric="negative_flips", max=0.02)]))
    finding = verdict.findings[1]
    assert finding.outcome == verdict.outcome == outcome
    assert finding.bound == "value <= 0.02"
    assert finding.minimum_detectable is not None
    assert finding.minimum_detectable > 0
    if flipped == 0:  # the chance of none at all is then half of 0.025
        assert finding.interval is not None
        assert (1 - finding.interval.high) ** queries == pytest.approx(0.0125)


def test_all_bounds_must_hold_and_the_reasons_are_those_that_decided():
    new = np.ones(60)
    bounds = {"good": Threshold(metric=MAP, min=0.5), "bad": Threshold(metric=MAP, max=0.5)}
    bounds["unknown"] = Threshold(metric=MAP, min=0.5, segment="nowhere")
    told_of = []
    for wanted in ([], ["good"], ["good", "unknown"], ["unknown", "bad", "good"]):
        verdict = gate(asked(np.zeros(60), new), QUICK.model_copy(update={"thresholds": [bounds[w] for w in wanted]}))
        told_of.append((verdict.outcome, len(verdict.reasons), len(verdict.findings)))
    assert told_of == [("pass", 1, 1), ("pass", 2, 2), ("inconclusive", 1, 3), ("fail", 1, 4)]


def test_a_star_is_each_segment_and_no_segment_is_none():
    segments = ["b", "a", ""] * 20 + ["c"] * 5
    verdict = gate(
        asked(np.zeros(65), np.ones(65), segments=segments),
        QUICK.model_copy(update={"thresholds": [Threshold(metric=MAP, min_gain=0.5, segment="*")]}),
    )
    found = {finding.segment: (finding.outcome, finding.queries) for finding in verdict.findings}
    assert found == {None: ("pass", 65), "a": ("pass", 20), "b": ("pass", 20), "c": ("inconclusive", 5)}
    assert told(verdict) == "segment 'c': 5 queries have relevant items, the gate needs 10: add labelled queries"


@pytest.mark.parametrize(
    ("segment", "segments", "reason"),
    [
        ("a", None, r"^segment 'a': queries have no segments: set verify\.segment"),
        ("*", None, "queries have no segments"),
        ("a", ["b\n" + "x" * 99] * 30, r"no query is in it; there are 'b\\nx+'…$"),
        ("a", [""] * 30, "no query is in it; there are none"),
        ("*", [""] * 30, "no query is in it; there are none"),
    ],
)
def test_a_segment_without_queries_is_inconclusive(segment, segments, reason):
    wanted = QUICK.model_copy(update={"thresholds": [Threshold(metric=MAP, min_gain=0.5, segment=segment)]})
    verdict = gate(asked(np.zeros(30), np.ones(30), segments=segments), wanted)
    assert verdict.outcome == "inconclusive"
    assert re.search(reason, told(verdict)), verdict.reasons


def test_whole_classes_are_drawn_again_unless_the_classes_are_all_there_are():
    # Of ten classes seven gain and three lose, each with all of its queries.
    classes = np.repeat(np.arange(10), 40)
    new = np.where(classes < 7, 0.1, -0.1) + row(0, 0.02, 400)
    by_class = gate(asked(np.zeros(400), new, clusters=classes), QUICK)
    assert by_class.outcome == "inconclusive"
    assert re.search(r"over 400 queries of 10 classes:", told(by_class))
    queries, needed = map(
        int, re.findall(r"about (\d+) queries like these, of about (\d+) classes,", told(by_class))[0]
    )
    assert queries == pytest.approx(40 * needed, rel=0.1)
    by_query = gate(asked(np.zeros(400), new, clusters=classes), QUICK.model_copy(update={"cluster": "query"}))
    assert by_query.outcome == "pass"
    assert "classes" not in told(by_query)


def test_one_class_says_nothing_of_others():
    measured = asked(np.zeros(50), np.ones(50), clusters=np.zeros(50, np.int64))
    verdict = gate(measured, QUICK)
    assert verdict.outcome == "inconclusive"
    assert verdict.interval is None
    assert "all 50 queries are of one class: add queries of other classes" in told(verdict)
    assert gate(measured, QUICK.model_copy(update={"cluster": "query"})).outcome == "pass"


def test_queries_that_count_in_no_search_are_left_out():
    old, new = row(0.5, 0.1, 100), row(0.6, 0.1, 100)
    verdict = gate(asked(np.append(old, [NAN] * 50), np.append(new, [NAN] * 50)), QUICK)
    assert verdict == gate(asked(old, new), QUICK)
    assert verdict.queries == 100


def test_a_later_look_is_stricter():
    new = row(0.024, 0.1, 100)  # 2.4 standard errors
    first, second, tenth = (gate(asked(np.zeros(100), new), Gate(), analysis=look) for look in (1, 2, 10))
    assert (first.outcome, second.outcome, tenth.outcome) == ("pass", "inconclusive", "inconclusive")
    lows = [verdict.interval.low for verdict in (first, second, tenth) if verdict.interval is not None]
    assert lows[0] > lows[1] > lows[2]
    assert [verdict.confidence for verdict in (first, second)] == [
        interim_confidence(0.95, 1),
        interim_confidence(0.95, 2),
    ]
    assert "at 0.975 confidence over" in told(first)
    assert "at 0.991667 confidence (interim analysis 2) over" in told(second)
    with pytest.raises(ValueError, match="interim analysis 0"):
        gate(asked(new, new), Gate(), analysis=0)


def test_a_finding_is_what_its_column_alone_would_give():
    random = np.random.default_rng(4)
    old, new = random.uniform(size=(2, 80))
    wanted = QUICK.model_copy(update={"thresholds": [Threshold(metric=MAP, min=0.1), Threshold(metric=MAP, max=0.1)]})
    verdict = gate(asked(old, new), wanted, seed=3)
    alone = bootstrap(new[:, None], confidence=interim_confidence(0.95, 1), resamples=200, seed=3)
    assert verdict.findings[1].interval == pytest.approx(alone.interval(0))
    assert verdict.findings[1].interval == verdict.findings[2].interval
    assert gate(asked(old, new), wanted, seed=3) == verdict


def test_the_gate_looks_at_pairs():
    # The queries differ far more among themselves than the systems do on each of them.
    old = np.random.default_rng(9).uniform(size=60)
    assert gate(asked(old, old + row(0.02, 0.01, 60)), Gate()).outcome == "pass"
    assert gate(asked(old, np.roll(old, 1) + row(0.02, 0.01, 60)), Gate()).outcome == "inconclusive"


def test_the_advised_number_of_queries_does_decide():
    verdict = gate(asked(np.zeros(50), row(0.02, 0.1, 50)), Gate())
    assert verdict.outcome == "inconclusive"
    advised = int(re.findall(r"about (\d+) queries", told(verdict))[0])
    # Another query set is another look: 2.6383 is the normal quantile of 0.05 / 6, two-sided.
    assert advised == pytest.approx(((2.6383 + 0.8416) * 0.1 / 0.02) ** 2, rel=0.1)
    assert verdict.findings[0].queries_needed == advised
    enough = 2 * (advised // 2)
    assert gate(asked(np.zeros(enough), row(0.02, 0.1, enough)), Gate(), analysis=2).outcome == "pass"


# -- what users meet on the way ---------------------------------------------------------------------------------------

IN_PLACE: Any = ("cross", "lowest", "self")
SHARES = (0.0, 0.5, 1.0)


def migrated(old: float, cross: float, middle: float, after: float, *, spread: float = 0.05, n: int = 400) -> Measured:
    """A migration in place, with the mean of today's search and of the new one at each share of the backfill."""
    spreads = [row(at, spread, n) for at in (cross, middle, after)]
    return Measured(
        {MAP: np.full(n, old)},
        {MAP: spreads[0]},
        others={"lowest": {MAP: np.stack(spreads)}, "self": {MAP: spreads[2]}},
        default_tests=IN_PLACE,
        shares=SHARES,
    )


def by_test(verdict: Verdict) -> dict[str, Any]:
    return {finding.test: finding for finding in verdict.findings}


def test_by_default_the_canary_the_lowest_point_and_the_end_state_must_hold():
    verdict = gate(migrated(0.660, 0.663, 0.596, 0.611), Gate(resamples=2000))
    assert verdict.outcome == "fail"
    found = by_test(verdict)
    assert {test: at.outcome for test, at in found.items()} == {
        "cross": "inconclusive",
        "lowest": "fail",
        "self": "fail",
    }
    assert found["lowest"].share == 0.5
    assert found["lowest"].interval.mean == pytest.approx(-0.064)
    assert found["self"].interval.mean == pytest.approx(-0.049)
    assert verdict.interval == found["cross"].interval
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["lowest point of the backfill (50%)", "self-test"]
    assert gate(migrated(0.5, 0.6, 0.55, 0.7), Gate(resamples=2000)).outcome == "pass"


@pytest.mark.parametrize(("middle", "after"), [(0.45, 0.7), (0.55, 0.45)])
def test_a_better_canary_does_not_outweigh_a_worse_search_later(middle, after):
    assert gate(migrated(0.5, 0.9, middle, after), Gate(resamples=2000)).outcome == "fail"


def test_the_intervals_are_corrected_for_being_three_and_each_is_what_its_column_gives():
    measured = migrated(0.5, 0.52, 0.51, 0.53)
    verdict = gate(measured, Gate(resamples=2000), analysis=2, seed=5)
    confidence = 1 - (0.05 / 6) / 3
    assert verdict.confidence == pytest.approx(confidence)
    found = by_test(verdict)
    columns = np.stack([*measured.others["lowest"][MAP]], axis=1) - 0.5

    def alone(column: int, at: float) -> Any:
        return bootstrap(columns[:, [column]], confidence=at, resamples=2000, seed=5).interval(0)

    assert found["cross"].interval == pytest.approx(alone(0, confidence))
    assert found["self"].interval == pytest.approx(alone(2, confidence))
    # The lowest point was chosen by the data: above a limit everywhere is each share above it, and of the upper ends,
    # the lowest of which is taken, any of the three may err.
    assert found["lowest"].interval.low == pytest.approx(min(alone(column, confidence).low for column in range(3)))
    each = 1 - (1 - confidence) / 3
    assert found["lowest"].interval.high == pytest.approx(min(alone(column, each).high for column in range(3)))
    assert found["lowest"].interval.mean == pytest.approx(0.01)
    assert "at 0.997222 confidence (interim analysis 2)" in found["self"].reason


def test_three_tests_in_which_nothing_changes_err_no_more_often_than_agreed():
    # Noise alone: whoever took the worst of eleven shares for a difference would find a loss far too often.
    random = np.random.default_rng(8)
    failed = 0
    for number in range(150):
        shares = random.normal(0.5, 0.1, (11, 60))
        measured = Measured(
            {MAP: np.full(60, 0.5)}, {MAP: shares[0]}, default_tests=IN_PLACE,
            others={"lowest": {MAP: shares}, "self": {MAP: shares[-1]}},
        )  # fmt: skip
        failed += gate(measured, Gate(resamples=200), seed=number).outcome == "fail"
    # At most 2.5 % of either kind: 10 or more of 150 would come by chance once in a thousand times.
    assert failed < 10


@pytest.mark.parametrize(
    ("min_gain", "outcome", "accepted"),
    [
        (-0.02, "fail", {}),
        (-0.10, "pass", {"lowest": -0.064, "self": -0.049}),
        ({"self": -0.10}, "pass", {"lowest": -0.064, "self": -0.049}),
        ({"lowest": -0.10}, "fail", {"lowest": -0.064}),
        ({"self": -0.06, "lowest": -0.10}, "pass", {"lowest": -0.064, "self": -0.049}),
        ({"cross": -0.10}, "fail", {"lowest": -0.064}),
    ],
)
def test_a_loss_that_min_gain_allows_is_accepted_and_never_a_plain_pass(min_gain, outcome, accepted):
    verdict = gate(migrated(0.660, 0.690, 0.596, 0.611), Gate(resamples=2000, min_gain=min_gain))
    assert verdict.outcome == outcome
    assert verdict.accepted == (outcome == "pass")
    means = {at.test: at.gain and at.gain.mean for at in verdict.findings if at.accepted}
    assert means == pytest.approx(accepted)
    wanted = Gate(min_gain=min_gain)
    for at in verdict.findings:
        if at.accepted:
            note = f"worse by {-accepted[at.test]:.3f}; accepted by your gate (min_gain {wanted.least_gain(at.test):g})"
            assert at.note == note
            assert at.reason.endswith(f"; {note}")
        else:
            assert at.note is None


@pytest.mark.parametrize(
    ("bound", "note"),
    [
        ({"min": 0.5}, "worse by 0.050; accepted by your gate (min 0.5)"),
        ({"min_ratio": 0.9}, "worse by 0.050; accepted by your gate (min_ratio 0.9)"),
        ({"min_gain": -0.2}, "worse by 0.050; accepted by your gate (min_gain -0.2)"),
        ({"max": 0.9}, "worse by 0.050; accepted by your gate (max 0.9)"),
    ],
)
@pytest.mark.parametrize("test", ["self", "lowest"])
def test_whatever_bound_lets_a_loss_pass_it_is_accepted(bound, note, test):
    measured = migrated(0.700, 0.720, 0.710, 0.650)
    wanted = Gate(resamples=2000, min_gain=-1, thresholds=[Threshold(metric=MAP, test=test, **bound)])
    finding = gate(measured, wanted).findings[-1]
    assert (finding.outcome, finding.test, finding.accepted, finding.note) == ("pass", test, True, note)


def test_flips_are_no_loss_of_their_own():
    flips = share(3, 3000)
    measured = Measured({MAP: np.zeros(3000)}, {MAP: np.zeros(3000), "negative_flips": flips})
    verdict = gate(measured, Gate(resamples=200, thresholds=[Threshold(metric="negative_flips", max=0.02)]))
    assert (verdict.outcome, verdict.accepted, verdict.findings[1].gain) == ("pass", False, None)


@pytest.mark.parametrize(("test", "outcome"), [(None, "pass"), ("cross", "pass"), ("self", "fail"), ("lowest", "fail")])
def test_a_threshold_names_its_test(test, outcome):
    measured = migrated(0.5, 0.9, 0.8, 0.6)
    finding = gate(measured, Gate(resamples=500, thresholds=[Threshold(metric=MAP, min=0.7, test=test)])).findings[-1]
    assert (finding.outcome, finding.test) == (outcome, test or "cross")


def test_of_flips_the_greatest_share_is_the_worst_point():
    flips = np.stack([share(ones, 1000) for ones in (0, 200, 20)])
    measured = Measured(
        {MAP: np.zeros(1000)},
        {MAP: np.zeros(1000)},
        others={"lowest": {"negative_flips": flips}},
        shares=SHARES,
    )
    wanted = Gate(resamples=500, thresholds=[Threshold(metric="negative_flips", max=0.1, test="lowest")])
    finding = gate(measured, wanted).findings[-1]
    assert finding.interval is not None
    assert (finding.outcome, finding.share, finding.interval.mean) == ("fail", 0.5, 0.2)


def test_a_shadow_is_bounded_where_it_is_served_and_another_test_can_be_named():
    n = 200
    measured = Measured({MAP: np.full(n, 0.5)}, {MAP: row(0.6, 0.05, n)}, served="self")
    verdict = gate(measured, Gate(resamples=500))
    assert [(at.test, at.outcome) for at in verdict.findings] == [("self", "pass")]
    assert verdict.confidence == interim_confidence(0.95, 1)
    assert told(verdict).startswith("map@100 gain")
    wanted = Gate(resamples=500, thresholds=[Threshold(metric=MAP, min=0.5, test="cross")])
    unmeasured = gate(measured, wanted)
    assert unmeasured.outcome == "inconclusive"
    assert "it was not measured for this strategy and these vectors" in told(unmeasured)


def test_a_default_test_that_was_not_measured_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="the self-test must be measured"):
        gate(Measured({MAP: np.zeros(30)}, {MAP: np.zeros(30)}, default_tests=("cross", "self")), Gate())


@pytest.mark.parametrize(
    "measured",
    [
        asked(np.zeros(30), np.zeros(31)),
        asked(np.zeros((30, 1)), np.zeros((30, 1))),
        asked(np.zeros(30), np.zeros(30), clusters=np.zeros(29, np.int64)),
        asked(np.zeros(30), np.zeros(30), segments=["a"] * 31),
        Measured({}, {MAP: np.zeros(30)}),
        Measured({MAP: np.zeros(30)}, {}),
    ],
)
def test_rows_of_different_queries_are_refused(measured):
    with pytest.raises(ValueError, match=r"same queries|both searches"):
        gate(measured, Gate())


BOUNDS = st.sampled_from([{"min": 0.0}, {"max": 1.0}, {"min_gain": -1.0}, {"min_ratio": 0.01}])


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, st.integers(0, 9), elements=VALUES), st.integers(0, 5), BOUNDS, st.booleans())
def test_too_little_data_never_passes_nor_fails(new, without, bound, flips):
    new = np.append(new, [NAN] * without)
    name = "negative_flips" if flips and "max" in bound else MAP
    wanted = QUICK.model_copy(update={"min_gain": -1, "thresholds": [Threshold(metric=name, **bound)]})
    measured = Measured({MAP: new}, {MAP: new, name: new})
    assert [finding.outcome for finding in gate(measured, wanted).findings] == ["inconclusive"] * 2


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, st.integers(10, 40), elements=VALUES), st.data())
def test_a_single_number_that_is_not_finite_never_passes(new, data):
    broken = new.copy()
    broken[data.draw(st.integers(0, len(new) - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    wanted = QUICK.model_copy(update={"thresholds": [Threshold(metric=MAP, min=0.0)]})
    for measured in (asked(np.zeros(len(new)), broken), asked(broken, new)):
        assert [finding.outcome for finding in gate(measured, wanted).findings] == ["inconclusive"] * 2


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float64, (2, 20), elements=VALUES),
    st.floats(0, 1, width=32),
    st.floats(-0.5, 0.5, width=32),
)
def test_the_better_the_new_values_the_better_the_verdict(rows, shift, min_gain):
    order = ["fail", "inconclusive", "pass"]
    old, new = rows
    wanted = QUICK.model_copy(update={"min_gain": min_gain})
    before, after = gate(asked(old, new), wanted), gate(asked(old, new + shift), wanted)
    if shift > 1e-9:  # below that the sums' rounding decides
        assert order.index(after.outcome) >= order.index(before.outcome)
    # The verdict is the interval's: never two at once.
    assert before.interval is not None
    low, high = before.interval.low, before.interval.high
    assert low <= high
    assert (before.outcome == "pass") == (low >= min_gain)
    assert (before.outcome == "fail") == (high < min_gain)
