"""What the gate's bootstrap costs: seconds and peak memory, `python -m bench.bootstrap`."""

from __future__ import annotations

import json
import statistics
import time
import tracemalloc
from typing import Any

import numpy as np
import scipy

from bench.machine import machine
from migrator.evaluation.bootstrap import bootstrap as cluster_bootstrap

QUERIES, RESAMPLES, COLUMNS = 10_000, 10_000, 6


def measure(clusters: int | None, *, runs: int) -> dict[str, Any]:
    """Bounds for six columns, of which one counts half of the queries; None: each query is its own cluster."""
    random = np.random.default_rng(0)
    values = random.normal(size=(QUERIES, COLUMNS))
    values[::2, -1] = np.nan
    of_query = None if clusters is None else random.integers(0, clusters, QUERIES)

    def once(resamples: int) -> None:
        cluster_bootstrap(values, of_query, confidence=0.95, resamples=resamples, seed=0)

    once(100)  # imports
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        once(RESAMPLES)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    once(RESAMPLES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "queries": QUERIES,
        "clusters": QUERIES if clusters is None else clusters,
        "resamples": RESAMPLES,
        "columns": COLUMNS,
        "median_seconds": round(statistics.median(seconds), 3),
        "seconds": [round(one, 3) for one in seconds],
        "peak_mib": round(peak / 2**20, 1),
    }


def bootstrap(runs: int = 3) -> dict[str, Any]:
    """One row for queries drawn again one by one (aim: under ten seconds on two cores), one for 200 classes."""
    return {
        "machine": machine(),
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
        "bootstrap": [measure(clusters, runs=runs) for clusters in (None, 200)],
    }


if __name__ == "__main__":
    print(json.dumps(bootstrap(), indent=2))
