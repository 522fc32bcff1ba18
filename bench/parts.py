"""Where a backfill's time goes: seconds inside each part, summed over calls. Threads overlap, so the sum may exceed
the wall time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from bench.backfill import Projection
from migrator.artifacts.undo_log import UndoLog
from migrator.backfill.pipeline import Pipeline
from migrator.ledger import Ledger

PARTS = ("read", "images", "encoder", "undo log", "write", "publish", "ledger")


@contextmanager
def timed_parts(store: type[Any]) -> Iterator[dict[str, float]]:
    """Seconds by part, while it lasts; `store` is the adapter's class."""
    seconds = dict.fromkeys(PARTS, 0.0)
    inside = [
        *((store, name, "read") for name in ("scan", "unstamped", "count", "scan_ids")),
        (Pipeline, "_load", "images"),
        (Projection, "encode", "encoder"),
        (UndoLog, "record", "undo log"),
        (store, "write_vectors", "write"),
        (store, "publish", "publish"),
        *((Ledger, name, "ledger") for name in ("lease_chunk", "finish_chunk", "add_chunks", "extend_leases")),
    ]
    with ExitStack() as stack:
        for owner, name, part in inside:
            stack.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), seconds, part)))
        yield seconds


def _timed(call: Any, seconds: dict[str, float], part: str) -> Any:
    @wraps(call)
    def timed(*words: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*words, **options)
        finally:
            seconds[part] += time.perf_counter() - began

    return timed
