"""Progress in SQL: what was planned, trained, verified, routed and written."""

from migrator.ledger.ledger import (
    BACKFILL_STAGES,
    SEARCH,
    Counts,
    Failure,
    LeaseLost,
    Ledger,
    RouteMoved,
    now,
    this_process,
)
from migrator.ledger.models import (
    STAGES,
    BackfillRun,
    Chunk,
    ItemFailure,
    Migration,
    Plan,
    Route,
    RouteClientRow,
    Stage,
    StageEvent,
    Verification,
)

__all__ = [
    "BACKFILL_STAGES",
    "SEARCH",
    "STAGES",
    "BackfillRun",
    "Chunk",
    "Counts",
    "Failure",
    "ItemFailure",
    "LeaseLost",
    "Ledger",
    "Migration",
    "Plan",
    "Route",
    "RouteClientRow",
    "RouteMoved",
    "Stage",
    "StageEvent",
    "Verification",
    "now",
    "this_process",
]
