"""What a plan says of a store, and which strategy it recommends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from migrator.adapters.base import Capabilities
from migrator.plan.capabilities import describe_capabilities, describe_dim, recommend

PLAIN = Capabilities(
    update_in_place=True, visible="at_once", stamps=True, concurrent_writers=True, exact_vectors=True,
    normalises=False, partial_update=True, aliases=True, notes=("a note",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "same_dim", "strategy", "why"),
    [
        ({}, True, "in_place", "half the space"),
        ({}, False, "shadow", "another length"),
        ({"update_in_place": False, "visible": "at_cutover"}, True, "shadow", "cannot be changed in place"),
        ({"exact_vectors": False}, True, "shadow", "approximations"),
        ({"stamps": False}, True, "in_place", "half the space"),
        ({"stamps": False, "normalises": True}, True, "shadow", "stamps"),
        ({"partial_update": False}, True, "shadow", "whole items"),
        ({"in_place_refusal": "makes its own keys"}, True, "shadow", "no vector of this collection can be replaced"),
    ],
)
def test_the_strategy_follows_from_what_the_store_can_do(change, same_dim, strategy, why):
    found, reason = recommend(replace(PLAIN, **change), same_dim=same_dim)
    assert found == strategy
    assert why in reason


def test_a_shadow_that_would_be_refused_is_not_recommended():
    lost = "it has a function that a copy would lose: use rollout.strategy in_place"
    coarse = replace(PLAIN, update_in_place=False, exact_vectors=False, visible="at_cutover")
    assert recommend(coarse, same_dim=True)[0] == "shadow"
    assert recommend(coarse, same_dim=True, lost=lost)[0] == "in_place"
    neither = replace(PLAIN, update_in_place=False, in_place_refusal="makes its own keys")
    assert recommend(neither, same_dim=True, lost=lost)[0] == "shadow"
    assert describe_capabilities(coarse, lost=lost)[-1] == f"a shadow is refused here: {lost}"


@pytest.mark.parametrize(
    ("new", "made_by", "says"),
    [
        (128, "projection", "a projection behind its backbone makes 128 numbers, as many as the stored"),
        (128, "map", "a map behind it makes 128 numbers, as many"),
        (256, "projection", "makes 256 numbers, the stored vectors have 128: old and new cannot be compared"),
        (128, "itself", "gives 128 numbers, as many"),
    ],
)
def test_a_plan_says_where_the_length_of_the_new_vectors_comes_from(new, made_by, says):
    assert says in describe_dim(stored=128, new=new, made_by=made_by)


def test_every_capability_has_its_sentence():
    said = describe_capabilities(PLAIN)
    assert said[-1] == "a note"
    for field in ("visible", "stamps", "concurrent_writers", "normalises", "partial_update", "aliases"):
        other: dict[str, Any] = {field: {"visible": "on_publish"}.get(field, not getattr(PLAIN, field))}
        assert describe_capabilities(replace(PLAIN, **other)) != said, field
