"""What can be measured at each stage, and what a forecast and earlier results say of a loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from migrator.config import Gate
from migrator.evaluation.bootstrap import Interval
from migrator.evaluation.verdicts import amount, finding_state, losses, main_loss, state_of, summary
from migrator.ledger import Counts
from migrator.lifecycle.validity import gallery_of
from migrator.plan.forecast import Quality, loss_risks


def counts(passes: int = 0, failures: int = 0) -> Counts:
    return Counts(by_state={}, planned=10, done=0, written=0, gone=0, passes=passes, open_failures=failures)


@pytest.mark.parametrize(
    ("strategy", "stage", "state", "passes", "failures", "gallery"),
    [
        ("in_place", "planned", "planned", 0, 0, "old"),
        ("in_place", "canary", "active", 0, 0, "old"),
        ("in_place", "backfill", "active", 0, 0, "old"),
        ("in_place", "backfill", "active", 1, 0, "mixed"),
        ("in_place", "cutover", "active", 2, 0, "new"),
        ("in_place", "cutover", "active", 2, 3, "mixed"),
        ("in_place", "finalize", "finished", 2, 0, "new"),
        ("in_place", "backfill", "rolling_back", 1, 0, "mixed"),
        ("in_place", "backfill", "rolled_back", 1, 0, "old"),
        ("shadow", "backfill", "active", 1, 0, "old"),
        ("shadow", "canary", "active", 1, 3, "old"),
        ("shadow", "cutover", "active", 1, 3, "new"),
        ("shadow", "finalize", "finished", 1, 0, "new"),
        ("shadow", "cutover", "rolling_back", 1, 0, "old"),
        ("shadow", "cutover", "rolled_back", 1, 0, "old"),
    ],
)
def test_whose_vectors_queries_meet(strategy, stage, state, passes, failures, gallery):
    migration: Any = SimpleNamespace(strategy=strategy, stage=stage, state=state)
    assert gallery_of(migration, counts(passes, failures)) == gallery


# -- a forecast -------------------------------------------------------------------------------------------------------


def quality(*gains: tuple[float, float, float]) -> Quality:
    return Quality("map@100", 0.66, tuple(0.66 + mean for mean, *_ in gains), 256, tuple(Interval(*at) for at in gains))


def test_a_forecast_loss_is_a_risk_and_says_what_the_gate_makes_of_it():
    # The real example: the canary a little better, the way and the end worse.
    example = quality((0.003, -0.01, 0.016), (-0.03, -0.05, -0.01), (-0.064, -0.08, -0.05), (-0.049, -0.062, -0.036))
    assert loss_risks(example, Gate()) == [
        "forecast at the lowest point of the backfill: map@100 worse by 0.064 (between -0.0800 and -0.0500); verify "
        "will probably not pass with min_gain 0",
        "forecast after the backfill: map@100 worse by 0.049 (between -0.0620 and -0.0360); verify will probably not "
        "pass with min_gain 0",
    ]
    allowed = loss_risks(example, Gate(min_gain={"self": -0.07}))
    assert allowed[1].endswith("(between -0.0620 and -0.0360); accepted by your gate (min_gain -0.07)")
    assert allowed[0].endswith("verify will probably not pass with min_gain -0.07")


def test_a_forecast_that_is_not_sure_says_so_and_a_gain_is_no_risk():
    (only,) = loss_risks(quality((-0.01, -0.03, 0.01)), Gate())
    assert only.endswith("the sample of 256 items is too small to be sure, verify measures more")
    assert loss_risks(quality((0.1, 0.05, 0.15), (0.2, 0.1, 0.3)), Gate()) == []
    assert loss_risks(None, Gate()) == []
    assert loss_risks(Quality("map@100", 0.6, None, 256), Gate()) == []


# -- results of any version -------------------------------------------------------------------------------------------

LOSS = {"mean": -0.049, "low": -0.062, "high": -0.036}
BEFORE = {
    "metric": "map@100",
    "bound": "gain >= 0",
    "segment": None,
    "outcome": "pass",
    "interval": {**LOSS, "high": 0.01},
}


def test_results_of_an_earlier_version_tell_the_losses_that_its_gate_did_not_look_at():
    example = {
        "outcome": "pass", "served": "cross", "metric": "map@100", "findings": [BEFORE], "reasons": ["gain +0.003"],
        "differences": {"self": {"map@100": LOSS}},
        "curve": {"lowest": {"gain": {"mean": -0.064, "low": -0.08, "high": -0.05}}},
    }  # fmt: skip
    assert state_of(example) == "accepted"
    assert (
        main_loss(example)
        == "after the backfill: worse by 0.049; the gate of the version that verified did not cover it"
    )
    assert len(losses(example)) == 2
    assert summary(example).startswith("accepted: at the lowest point of the backfill: worse by 0.064; ")
    assert state_of({**example, "differences": {}, "curve": None}) == "pass"
    assert state_of({**example, "outcome": "fail"}) == "fail"


def test_a_shadow_of_an_earlier_version_whose_own_bound_allowed_the_loss():
    finding = {**BEFORE, "bound": "gain >= -0.5", "interval": {"mean": -0.232, "low": -0.25, "high": -0.21}}
    assert finding_state(finding) == "accepted"
    assert losses({"outcome": "pass", "served": "self", "metric": "map@100", "findings": [finding]}) == [
        "after the backfill: worse by 0.232; accepted by your gate (min_gain -0.5)"
    ]


@pytest.mark.parametrize(
    "results", [{}, {"outcome": "pass"}, {"findings": None}, {"outcome": "pass", "findings": [{}]}]
)
def test_little_is_known_of_some(results):
    assert losses(results) == []
    assert state_of(results) == results.get("outcome")


def test_a_loss_in_a_segment_or_another_metric_says_where():
    finding = {
        "test": "self", "metric": "recall@1", "segment": "shoes", "outcome": "pass", "accepted": True,
        "note": "worse by 0.020; accepted by your gate (min 0.5)",
    }  # fmt: skip
    (said,) = losses({"outcome": "pass", "served": "self", "metric": "map@100", "findings": [finding]})
    assert said.startswith("after the backfill, recall@1, segment 'shoes': worse by 0.020; accepted")


@pytest.mark.parametrize(
    ("value", "said"), [(-0.049, "0.049"), (0.1, "0.100"), (-0.00031, "0.00031"), (-0.0004, "0.0004")]
)
def test_amounts(value, said):
    assert amount(value) == said
