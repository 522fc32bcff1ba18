"""How fast and how small exact search is at real sizes, `python -m bench.verify_speed`.

The four tests of a verification (queries and gallery by the old and the new encoder) against four searches of a plain
faiss `IndexFlatIP` over the same vectors. They take turns, so that what else the machine does meets both. Memory is
measured in processes of their own: the most a process had, above the vectors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import migrator.cli  # noqa: F401 - first, as for users: it decides how OpenMP's threads wait
from bench.machine import machine
from bench.memory import memory_of_this_process
from migrator.evaluation.exact_search import mixtures, rank

QUERIES, DIM, K, CLASSES = 1_000, 256, 100, 10_000
SHARES = tuple(share / 10 for share in range(11))

Vectors = NDArray[np.float32]


def verify_speed(items: int = 1_000_000, rounds: int = 5) -> dict[str, Any]:
    """Seconds of the four tests, by us and by faiss, their ratio in each round, and what memory they add."""
    import faiss

    (queries_old, old), (queries_new, new) = (vectors(items, seed) for seed in (0, 1))
    indexes = []
    for gallery in (old, new):
        indexes.append(faiss.IndexFlatIP(DIM))
        indexes[-1].add(gallery)
    both, order = np.vstack([queries_old, queries_new]), np.random.default_rng(2).permutation(items)
    runs: dict[str, Callable[[], Any]] = {
        "faiss": lambda: [index.search(queries, K)[1] for index in indexes for queries in (queries_old, queries_new)],
        "rank": lambda: [rank(both, gallery, K) for gallery in (old, new)],
        "mixtures": lambda: mixtures(queries_new, old, new, order, SHARES, K),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers = {}
    for number in range(rounds + 1):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            answers[name] = runs[name]()
            if number:  # the first round warms up
                seconds[name].append(round(time.perf_counter() - began, 3))
    ours, theirs = np.vstack(answers["rank"]), np.vstack(answers["faiss"])
    ratios = [round(a / b, 3) for a, b in zip(seconds["rank"], seconds["faiss"], strict=True)]
    return {
        "items": items,
        "queries": QUERIES,
        "dim": DIM,
        "k": K,
        "shares": len(SHARES),
        "seconds": seconds,
        "median_seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "same_answers_as_faiss": float(np.mean(ours == theirs)),  # not quite 1: faiss compares float32 sums
        "memory_mib": {name: memory(name, items) for name in ("vectors", "rank", "mixtures")},
    }


def vectors(items: int, seed: int) -> tuple[Vectors, Vectors]:
    """Unit-length queries (q, d) and gallery (n, d) of the same classes, made without large copies."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((CLASSES, DIM), dtype=np.float32)
    found = []
    for count in (QUERIES, items):
        made = np.empty((count, DIM), np.float32)
        for start in range(0, count, 10_000):
            part = made[start : start + 10_000]
            random.standard_normal(out=part, dtype=np.float32)
            part += centres[random.integers(0, CLASSES, len(part))]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        found.append(made)
    return found[0], found[1]


def memory(what: str, items: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.verify_speed", "--memory-of", what, "--items", str(items)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def memory_in_this_process(what: str, items: int) -> dict[str, float]:
    """MiB of the vectors of both encoders, and what the process had beyond them at most, Python and libraries too."""
    (queries_old, old), (queries_new, new) = (vectors(items, seed) for seed in (0, 1))
    if what == "rank":
        both = np.vstack([queries_old, queries_new])
        for gallery in (old, new):
            rank(both, gallery, K)
    elif what == "mixtures":
        order = np.random.default_rng(2).permutation(items)
        mixtures(queries_new, old, new, order, SHARES, K)
    held = sum(array.nbytes for array in (queries_old, old, queries_new, new)) / (1 << 20)
    return {"vectors": round(held, 1), "beyond": round(memory_of_this_process("VmHWM") - held, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.verify_speed", description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=["vectors", "rank", "mixtures"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory_of:
        print(json.dumps(memory_in_this_process(chosen.memory_of, chosen.items)))
    else:
        found = {"machine": machine(), "verify_speed": verify_speed(chosen.items, chosen.rounds)}
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
