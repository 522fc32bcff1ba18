"""The three aims of verification: exact search at real sizes, the bootstrap, and a whole `verify` of the demo."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bootstrap import bootstrap
from bench.results_files import heading
from bench.verify_speed import verify_speed
from migrator import demo as story
from migrator.cli import run
from migrator.project import Project

ROUNDS = 5


def verify() -> dict[str, Any]:
    return {"search": verify_speed(), "bootstrap": bootstrap()["bootstrap"], "demo": of_the_demo()}


def of_the_demo() -> dict[str, Any]:
    """Seconds of a whole verification of the demo, and how many of them encoders took."""
    from migrator.verify.run import verify as verify_once

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        story.make_folder(folder, replace=False)
        story.make_old_system(folder, "faiss")
        story.run_demo(folder, stop_after="prepare", run=run, say=print)
        whole, encoding = [], []
        with Project.open(folder / "migrations.yaml") as project:
            for _ in range(ROUNDS):
                began = time.perf_counter()
                verified = verify_once(project)
                whole.append(round(time.perf_counter() - began, 3))
                encoding.append(verified.results.encoding_seconds)
    return {
        "queries": verified.results.queries,
        "gallery": verified.results.gallery,
        "seconds": whole,
        "encoding_seconds": encoding,
        "median_beyond_encoding": round(
            statistics.median(all_of - of for all_of, of in zip(whole, encoding, strict=True)), 3
        ),
    }


def verify_table(results: dict[str, Any]) -> str:
    found = results["verify"]
    search, demo = found["search"], found["demo"]
    memory = search["memory_mib"]
    lines = heading("Verification", results, "Medians, and all runs; faiss and migrator take turns in one process.")
    lines += [
        "| what | aim | measured | runs |",
        "|---|---|---|---|",
        f"| old, cross, self and reverse test, {search['queries']:,} queries on {search['items']:,} x {search['dim']}, "
        f"k = {search['k']}, over four plain faiss searches | at most 1.20 | {search['median_ratio']:.2f} | "
        f"{', '.join(f'{ratio:.2f}' for ratio in search['ratios'])} |",
        f"| the same, memory beyond the vectors | at most 1024 MiB | {memory['rank']['beyond']:.0f} MiB, of which "
        f"{memory['vectors']['beyond']:.0f} are Python and its libraries | |",
    ]
    for row in found["bootstrap"]:
        clusters = "queries" if row["clusters"] == row["queries"] else f"{row['clusters']} classes"
        lines.append(
            f"| bootstrap by {clusters}, {row['queries']:,} queries x {row['resamples']:,} resamples x "
            f"{row['columns']} metrics | under 10 s | {row['median_seconds']:.2f} s | "
            f"{', '.join(f'{one:.2f}' for one in row['seconds'])} |"
        )
    lines += [
        f"| whole `verify` of the demo beyond its encoders, {demo['queries']} queries on {demo['gallery']:,} items | "
        f"under 10 s | {demo['median_beyond_encoding']:.1f} s | "
        f"{', '.join(f'{a - b:.1f}' for a, b in zip(demo['seconds'], demo['encoding_seconds'], strict=True))} |",
        "",
        f"Seconds of the four searches: faiss {search['median_seconds']['faiss']:.1f}, migrator "
        f"{search['median_seconds']['rank']:.1f}; the backfill curve of {search['shares']} shares takes "
        f"{search['median_seconds']['mixtures']:.1f} s and {memory['mixtures']['beyond']:.0f} MiB beyond the vectors.",
        f"Of all answers {search['same_answers_as_faiss']:.4%} are in the place that faiss gives them; faiss compares "
        "float32 sums, migrator decides among near-equal scores in float64.",
    ]
    return "\n".join(lines) + "\n"
