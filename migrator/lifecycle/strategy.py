"""The strategies of a migration, in one table.

Everything that depends on a strategy is decided here, or by a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["planned", "prepare", "canary", "backfill", "cutover", "finalize"]
StrategyName: TypeAlias = Literal["in_place", "shadow"]
Test: TypeAlias = Literal["cross", "self"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to bring new vectors to the queries."""

    name: StrategyName
    stages: tuple[Stage, ...]
    """The stages in the order in which a migration passes them."""
    backfill_stages: tuple[Stage, ...]
    """The stages in which chunks are worked on."""
    second_collection: bool
    """New vectors go into a second collection, which is copied from the first; else they replace the old ones, which
    an undo log keeps. Without one the gallery is mixed from the first chunk on, and both encoders have one length."""
    served_test: Test
    """What users meet first: new queries against the old gallery (cross) or against the new one (self)."""
    purposes: Mapping[str, str]
    """What each command is for, as a plan lists them, in the order of use."""

    @property
    def queries_first(self) -> bool:
        """Whether every query moves to the new encoder before the first vector does."""
        return self.stages.index("canary") < self.stages.index("backfill")

    @property
    def moved_stages(self) -> tuple[Stage, ...]:
        """The stages in which every query uses the new encoder."""
        return self.stages[self.stages.index("canary") + 1 :]

    def before(self, stage: Stage) -> Stage:
        """The stage that `stage` follows."""
        return self.stages[self.stages.index(stage) - 1]

    def after(self, stage: Stage) -> Stage:
        """The stage that follows `stage`, which is not the last."""
        return self.stages[self.stages.index(stage) + 1]

    def opens_from(self, stage: Stage) -> tuple[Stage, ...]:
        """Every stage between `planned` and `stage`, both excluded."""
        return self.stages[1 : self.stages.index(stage)]

    def next_stage(self, stage: Stage, *, canary_percent: float) -> Stage:
        """The stage that `rollout` opens after `stage`; again `canary` until it is at 100 %."""
        is_full = canary_percent >= 100
        if stage == "canary" and not is_full:
            return "canary"
        following = self.after(stage)
        return self.after("canary") if following == "canary" and is_full else following


_RESERVE = "reserve the collection and write its route: every query to the old encoder"
_FINALIZE = "end the migration; with --drop-old what is old is deleted"

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "in_place": Strategy(
            name="in_place",
            stages=("planned", "prepare", "canary", "backfill", "cutover", "finalize"),
            backfill_stages=("backfill",),
            second_collection=False,
            served_test="cross",
            purposes=MappingProxyType(
                {
                    "verify": "canary, lowest point of the backfill and end state must be at least as good as today",
                    "rollout --stage prepare": _RESERVE,
                    "rollout --stage canary": "move queries to the new encoder step by step; stored vectors stay",
                    "rollout --stage backfill": "open the backfill, once every query is with the new encoder",
                    "backfill": "re-embed the stored images in bounded runs, by cron; old vectors go to the undo log "
                    "first",
                    "rollout --stage cutover": "prove that every item was re-embedded, then make the new encoder the "
                    "only one",
                    "rollout --stage finalize": _FINALIZE,
                }
            ),
        ),
        "shadow": Strategy(
            name="shadow",
            stages=("planned", "prepare", "backfill", "canary", "cutover", "finalize"),
            backfill_stages=("backfill", "canary"),  # the copy is kept up with the collection until the cutover
            second_collection=True,
            served_test="self",
            purposes=MappingProxyType(
                {
                    "verify": "new queries against the new gallery must be at least as good as today",
                    "rollout --stage prepare": _RESERVE,
                    "rollout --stage backfill": "make a collection like this one beside it and open its backfill",
                    "backfill": "copy and re-embed in bounded runs, by cron, and keep up with what changes",
                    "rollout --stage canary": "move queries to the new collection step by step; writes go to both",
                    "rollout --stage cutover": "prove that both hold the same items, then move the route, and the "
                    "alias",
                    "rollout --stage finalize": _FINALIZE,
                }
            ),
        ),
    }
)
"""A new strategy is a row here, and its files in `backfill` and `rollout`."""
