"""Progress in SQL: what was planned, trained, verified, routed and written."""

from migrator.ledger.ledger import Counts, Failure, LeaseLost, Ledger, RouteMoved, now, this_process
from migrator.ledger.models import STAGES, BackfillRun, Chunk, ItemFailure, Migration, Plan, Route, Stage, Verification

__all__ = [
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
    "RouteMoved",
    "Stage",
    "Verification",
    "now",
    "this_process",
]
