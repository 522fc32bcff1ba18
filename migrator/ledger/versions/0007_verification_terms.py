"""Stored results use the terms of `migrator.verify`: query set, baseline, relevant, interim analysis, mismatched."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"


def upgrade() -> None:
    # The audit log is written once: `migrator.report.facts` reads the earlier terms of health checks.
    rows = sa.table("verifications", sa.column("id", sa.Integer), sa.column("results", sa.JSON))
    connection = op.get_bind()
    for identity, results in connection.execute(sa.select(rows.c.id, rows.c.results)).all():
        connection.execute(sa.update(rows).where(rows.c.id == identity).values(results=_results(results)))


def _rename(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same with other keys, in the same order."""
    return {names.get(key, key): value for key, value in document.items()}


def _inside(document: dict[str, Any], key: str, names: dict[str, str]) -> None:
    if isinstance(document.get(key), dict):
        document[key] = _rename(document[key], names)


def _results(results: dict[str, Any]) -> dict[str, Any]:
    results = _rename(results, {"look": "interim_analysis", "questions": "query_set", "ways_on": "next_steps"})
    old = {"old": "baseline"}
    _inside(results, "query_set", {"passed_over": "skipped"})
    _inside(results, "curve", {"worth": "auc_gain"})
    for key in ("tests", "intervals"):
        _inside(results, key, old)
    for key in ("histograms", "threshold", "live"):
        if isinstance(results.get(key), dict):
            _inside(results[key], "tests", old)
            _inside(results[key], "index_recall", old)
    for example in results.get("examples") or []:
        for side in ("old", "new"):
            example[side] = [_rename(found, {"right": "relevant"}) for found in example.get(side) or []]
    return results
