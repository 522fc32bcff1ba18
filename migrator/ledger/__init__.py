"""Progress in SQL: what was planned, trained, verified, routed and written."""

from migrator.ledger.ledger import (
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
    StageEvent,
    Verification,
)

__all__ = [
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
    "StageEvent",
    "Verification",
    "now",
    "this_process",
]
