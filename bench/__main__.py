"""`python -m bench`: runs the benchmarks and writes bench/results/backfill.json and .md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.backfill import engine, pipeline
from bench.machine import machine

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


def main() -> None:
    results = {
        "machine": machine(),
        "engine": [engine(20_000), engine(100_000)],
        "pipeline": pipeline(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "backfill.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "backfill.md").write_text(table(results))
    print(table(results))


main()
