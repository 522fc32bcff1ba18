"""Peak memory of a backfill, in a process of its own, for two sizes of the same collection.

What is asked is how memory grows with the collection beyond the vectors that an index in memory has to hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.backfill import DIM, EngineProject, open_backfill, run_whole
from bench.stores import KINDS, configure, unit_vectors

MIB = 1 << 20


def memory_of_this_process(which: str) -> float:
    """MiB: `VmRSS`, what it has now; `RssFile`, the part of it that files are; `VmHWM`, the most it had.

    (`getrusage` would count the parent's in.)
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def fill(kind: str, items: int, folder: Path) -> None:
    store = KINDS[kind]()
    store.fill(folder, unit_vectors(items))
    configure(store, folder)


def run(folder: Path) -> dict[str, float]:
    with EngineProject.open(folder / "migrations.yaml") as project:
        open_backfill(project, "projection")
        before = memory_of_this_process("VmRSS")
        files = memory_of_this_process("RssFile")
        run_whole(project)
        files = memory_of_this_process("RssFile") - files
    peak = memory_of_this_process("VmHWM")
    return {"before_mib": round(before, 1), "peak_mib": round(peak, 1), "files_mib": round(files, 1)}


def measure(kind: str, items: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = {}
        for step in ("fill", "run"):  # filling must not count
            done = subprocess.run(
                [sys.executable, "-m", "bench.memory", step, kind, str(items), name],
                check=True,
                capture_output=True,
                text=True,
            )
            if step == "run":
                found = json.loads(done.stdout.splitlines()[-1])
    return {"store": kind, "items": items, "vectors_mib": round(items * DIM * 4 / MIB, 1), **found}


def memory(
    kinds: tuple[str, ...] = ("faiss", "qdrant-edge"), sizes: tuple[int, ...] = (20_000, 200_000)
) -> list[dict[str, Any]]:
    return [measure(kind, items) for kind in kinds for items in sizes]


if __name__ == "__main__":
    import migrator.cli  # noqa: F401 - first, as for users

    step, kind, items, name = sys.argv[1:]
    if step == "fill":
        fill(kind, int(items), Path(name))
    else:
        print(json.dumps(run(Path(name))))
