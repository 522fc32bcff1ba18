"""What a choice costs the application that asks the route: `python -m bench route`."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.results_files import heading, save
from migrator.ledger import Ledger
from migrator.route import AsyncRouteClient, RouteClient, initial_route

CHOICES = 200_000
REPEATS = 7
KEYS = [f"user-{number}" for number in range(1000)]
TTL = 3600.0
"""Longer than the measurement: every choice but the first is a cached one."""


def route() -> None:
    """Measures cached choices and the read of a row, and saves bench/results/route."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder, 'migrator.db')}"
        migration = _prepared(url)
        rows: list[dict[str, Any]] = [{"what": "no canary", "microseconds": _choices(url)}]
        ledger = Ledger(url)
        columns = {"epoch": 1, "canary_encoder": "new", "canary_percent": 50.0, "phase": "canary"}
        ledger.move(migration, stage="canary", event="canary", route=columns)
        ledger.close()
        rows += [
            {"what": "canary at 50 %: the key is hashed", "microseconds": _choices(url)},
            {"what": "canary at 50 %, asyncio", "microseconds": asyncio.run(_async_choices(url))},
            {"what": "with a read of the row (SQLite), ttl 0", "microseconds": _choices(url, ttl=0.0, number=300)},
        ]
    results = {"machine": machine(), "route": rows}
    lines = heading("A choice of the route", results, f"Medians of {REPEATS} repeats.")
    lines += ["| choice | microseconds (aim for cached ones: below 5) | runs |", "|---|---|---|"]
    for row in rows:
        runs = ", ".join(f"{value:.2f}" for value in row["microseconds"])
        lines.append(f"| {row['what']} | {statistics.median(row['microseconds']):.2f} | {runs} |")
    save("route", results, "\n".join(lines) + "\n")


def _prepared(url: str) -> Any:
    ledger = Ledger(url)
    for encoder in ("old", "new"):
        ledger.save_encoder(encoder, "{}")
    ledger.save_plan(
        "bench", collection="bench", source="bench", alias=None, strategy="in_place", old_encoder_id="old",
        new_encoder_id="new", fingerprint="bench", bound={}, content={},
    )  # fmt: skip
    migration = ledger.migration("bench")
    assert migration is not None
    moved = ledger.move(
        migration, stage="prepare", state="active", event="prepare",
        route=initial_route(migration, salt="salt", epoch=0, ttl=TTL),
    )  # fmt: skip
    ledger.close()
    return moved


def _choices(url: str, *, ttl: float = TTL, number: int = CHOICES) -> list[float]:
    """Microseconds a choice, of each repeat."""
    found = []
    with RouteClient(url, "bench", ttl=ttl) as client:
        for _ in range(REPEATS):
            keys = KEYS * (number // len(KEYS)) or KEYS[:number]
            began = time.perf_counter()
            for key in keys:
                client.choose(key)
            found.append((time.perf_counter() - began) / len(keys) * 1e6)
    return found


async def _async_choices(url: str) -> list[float]:
    found = []
    async with await AsyncRouteClient.open(url, "bench") as client:
        for _ in range(REPEATS):
            keys = KEYS * (CHOICES // len(KEYS))
            began = time.perf_counter()
            for key in keys:
                await client.choose(key)
            found.append((time.perf_counter() - began) / len(keys) * 1e6)
    return found
