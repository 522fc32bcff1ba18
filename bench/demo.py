"""The demo's own numbers, as docs/explanation/benchmarks.md shows them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from migrator import demo as story
from migrator.cli import run
from migrator.project import Project

SHOWN = ("map@100", "recall@1", "recall@10", "ndcg@10", "mrr@100")


def demo() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        began = time.perf_counter()
        story.make_folder(folder, replace=False)
        story.make_old_system(folder, "faiss")
        story.run_demo(folder, stop_after=None, run=run, say=print)
        story.check(folder)
        seconds = time.perf_counter() - began
        with Project.open(folder / "migrations.yaml") as project:
            verification = project.ledger.latest_verification(project.migration().id)
        assert verification is not None
        return {
            "seconds": round(seconds),
            "quality": [
                {"what": what, "metrics": {name: metrics[name] for name in SHOWN}}
                for what, metrics in story.results(folder)
            ],
            "gain": verification.results["interval"],
            "confidence": verification.results["confidence"],
        }
