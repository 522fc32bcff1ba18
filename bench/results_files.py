"""Results as files: JSON for machines, Markdown for people, under bench/results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def heading(title: str, results: dict[str, Any], what: str) -> list[str]:
    where = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return [
        f"# {title}",
        "",
        f"{where['date']}, {where['cores']} cores of {where['processor']}, {where['memory_gib']} GiB, "
        f"Python {where['python']}; {packages}. {what}",
        "",
    ]


def save(name: str, results: dict[str, Any], text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
