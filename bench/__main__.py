"""`python -m bench`: runs the benchmarks and writes them to bench/results/, as JSON and as a table.

`train`, `sweep` and `train-speed` are the trainer's, and take options of their own (`python -m bench train --help`).
"""

from __future__ import annotations

import sys
from typing import Any

import migrator.cli  # noqa: F401 - first, as for users: it decides how torch's threads wait
from bench.backfill import engine, pipeline
from bench.demo import demo
from bench.machine import machine
from bench.memory import memory
from bench.parts import PARTS
from bench.results_files import heading, save
from bench.route import route
from bench.stores import stores
from bench.verify import verify, verify_table


def table(results: dict[str, Any]) -> str:
    where = results["machine"]
    lines = [
        "# Backfill on FAISS",
        "",
        f"{where['date']}, {where['cores']} cores of {where['processor']}, {where['memory_gib']} GiB, "
        f"Python {where['python']}, torch {where['packages']['torch']}, faiss {where['packages']['faiss-cpu']}. "
        "Medians of three runs.",
        "",
        "| what | aim | measured | runs |",
        "|---|---|---|---|",
    ]
    pipe = results["pipeline"]
    lines.append(
        f"| wall time of a backfill over its encoder alone ({pipe['items']:,} images, {pipe['arch']} "
        f"at {pipe['image_size']} px) | at most 1.10 | {pipe['median_ratio']:.2f} | "
        f"{', '.join(f'{ratio:.2f}' for ratio in pipe['ratios'])} |"
    )
    for row in results["engine"]:
        lines.append(
            f"| vectors/s with an encoder that costs nothing, {row['items']:,} x {row['dim']} | at least 20,000 | "
            f"{row['median_vectors_per_second']:,} | {', '.join(f'{rate:,}' for rate in row['vectors_per_second'])} |"
        )
    for row in results["engine"]:
        lines.append(
            f"| ledger after {row['items']:,} items | grows with chunks | {row['ledger_chunk_rows']} chunk rows, "
            f"{row['ledger_bytes'] // 1024} KiB, {row['ledger_bytes_per_item']} bytes an item | |"
        )
    return "\n".join(lines) + "\n"


def demo_table(results: dict[str, Any]) -> str:
    where = results["machine"]
    metrics = list(results["demo"]["quality"][0]["metrics"])
    lines = [
        "# The demo",
        "",
        f"One run of `migrator demo`, {results['demo']['seconds']} s on {where['cores']} cores of {where['processor']} "
        f"({where['date']}, torch {where['packages']['torch']}); installing is not counted. "
        "300 queries that no encoder was trained on, against 1,497 items.",
        "",
        "| quality | " + " | ".join(metrics) + " |",
        "|---|" + "---|" * len(metrics),
    ]
    for row in results["demo"]["quality"]:
        lines.append(f"| {row['what']} | " + " | ".join(f"{value:.4f}" for value in row["metrics"].values()) + " |")
    interval = results["demo"]["gain"]
    lines += [
        "",
        f"Cross-test over old self-test, mAP@100: {interval['mean']:+.4f}, "
        f"{results['demo']['confidence']:.1%} interval {interval['low']:+.4f} to {interval['high']:+.4f} "
        "(paired bootstrap over the ten classes).",
    ]
    return "\n".join(lines) + "\n"


def stores_table(results: dict[str, Any]) -> str:
    lines = heading(
        "Backfill on every store",
        results,
        "An encoder that costs nothing, in place; medians over the runs. The ceiling is a bare loop of the store's own "
        "client that reads everything and writes every vector, in the same run.",
    )
    lines += [
        "| store | items | chunk | client: read + write | backfill | vectors/s | share of ceiling (aim 0.8) | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["stores"]:
        seconds = row["seconds"]
        lines.append(
            f"| {row['store']} | {row['items']:,} x {row['dim']} | {row['chunk_size']:,} | "
            f"{seconds['client read']:.2f} + {seconds['client write']:.2f} s | {seconds['backfill']:.2f} s | "
            f"{row['vectors_per_second']:,} | {row['share_of_ceiling']:.2f} | "
            f"{', '.join(f'{share:.2f}' for share in row['shares_of_ceiling'])} |"
        )
    lines += [
        "",
        "Where the time goes: seconds inside each part. Reading, encoding and writing overlap.",
        "",
        "| store | " + " | ".join(PARTS) + " | wall |",
        "|---|" + "---|" * (len(PARTS) + 1),
    ]
    for row in results["stores"]:
        parts = " | ".join(f"{row['seconds'][part]:.2f}" for part in PARTS)
        lines.append(f"| {row['store']} | {parts} | {row['seconds']['backfill']:.2f} |")
    return "\n".join(lines) + "\n"


def memory_table(results: dict[str, Any]) -> str:
    lines = heading(
        "Memory of a backfill", results, "Peak of the process, before the backfill begins and at its end. One run each."
    )
    lines += [
        "| store | items | vectors alone | before | peak | added | of it files, which the system may drop |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["memory"]:
        added = row["peak_mib"] - row["before_mib"]
        lines.append(
            f"| {row['store']} | {row['items']:,} | {row['vectors_mib']:.0f} MiB | {row['before_mib']:.0f} MiB | "
            f"{row['peak_mib']:.0f} MiB | {added:.0f} MiB | {row['files_mib']:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        from bench import train

        return train.main(sys.argv[2:])
    if sys.argv[1:2] == ["sweep"]:
        from bench import sweep

        return sweep.main(sys.argv[2:])
    if sys.argv[1:2] == ["train-speed"]:
        from bench import train_speed

        return train_speed.main(sys.argv[2:])
    wanted = sys.argv[1:] or ["demo", "backfill", "stores", "memory", "verify", "route"]
    if "demo" in wanted:
        results: dict[str, Any] = {"machine": machine(), "demo": demo()}
        save("demo", results, demo_table(results))
    if "backfill" in wanted:
        results = {"machine": machine(), "engine": [engine(20_000), engine(100_000)], "pipeline": pipeline()}
        save("backfill", results, table(results))
    if "stores" in wanted:
        results = {"machine": machine(), "stores": stores()}
        save("stores", results, stores_table(results))
    if "memory" in wanted:
        results = {"machine": machine(), "memory": memory()}
        save("memory", results, memory_table(results))
    if "verify" in wanted:
        results = {"machine": machine(), "verify": verify()}
        save("verify", results, verify_table(results))
    if "route" in wanted:
        route()
    return None


if __name__ == "__main__":  # the benchmark's own processes import this file again
    main()
