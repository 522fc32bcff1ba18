"""`python -m bench`: runs the benchmarks and writes them to bench/results/, as JSON and as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import migrator.cli  # noqa: F401 - first, as for users: it decides how torch's threads wait
from bench.backfill import engine, pipeline
from bench.demo import demo
from bench.machine import machine
from bench.stores import stores

RESULTS = Path(__file__).parent / "results"


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
        f"Cross-test over old self-test, mAP@100: {interval['mean']:+.4f}, 95 % interval {interval['low']:+.4f} to "
        f"{interval['high']:+.4f} (paired bootstrap over the queries).",
    ]
    return "\n".join(lines) + "\n"


def stores_table(results: dict[str, Any]) -> str:
    where = results["machine"]
    lines = [
        "# Backfill on every store",
        "",
        f"{where['date']}, {where['cores']} cores of {where['processor']}, {where['memory_gib']} GiB, "
        f"Python {where['python']}; {', '.join(f'{name} {version}' for name, version in where['packages'].items())}. "
        "Embedded stores, one run, an encoder that costs nothing, in place, chunks of 5,000.",
        "",
        "| store | items | client: read all + write all | backfill | vectors/s | share of the ceiling (aim 0.8) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['store']} | {row['items']:,} x {row['dim']} | {row['client_read_seconds']:.2f} + "
        f"{row['client_write_seconds']:.2f} s | {row['backfill_seconds']:.2f} s | {row['vectors_per_second']:,} | "
        f"{row['share_of_ceiling']:.2f} |"
        for row in results["stores"]
    ]
    return "\n".join(lines) + "\n"


def save(name: str, results: dict[str, Any], text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def main() -> None:
    wanted = sys.argv[1:] or ["demo", "backfill", "stores"]
    if "demo" in wanted:
        results = {"machine": machine(), "demo": demo()}
        save("demo", results, demo_table(results))
    if "backfill" in wanted:
        results = {"machine": machine(), "engine": [engine(20_000), engine(100_000)], "pipeline": pipeline()}
        save("backfill", results, table(results))
    if "stores" in wanted:
        results = {"machine": machine(), "stores": stores()}
        save("stores", results, stores_table(results))


main()
