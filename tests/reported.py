"""A ledger with everything in it that a report can show: a planned world, a training, a verification, a backfill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from migrator.cli import run
from migrator.ledger import Ledger, Migration
from migrator.project import Project
from tests.world import World

SHARES = [number / 10 for number in range(11)]
BINS = 40


def plan_world(world: World) -> None:
    """The one step of the story that loads a model."""
    assert run(["plan", "--config", str(world.config)]) == 0


def fill_ledger(world: World, **changes: Any) -> None:
    """Training, verification and half a backfill of a planned world. `changes` are laid over the verification."""
    with Project.open(world.config) as project:
        ledger, migration = project.ledger, project.migration()
        _train(project.training_folder(), ledger, migration)
        save_verification(ledger, migration, {**results(world), **changes})
        _move_to_backfill(ledger, migration)
        for number, share in enumerate((0.21, 0.4, 0.55), start=1):
            ledger.end_run(ledger.start_run(migration.id, "host:1/1/ab"), "time is up")
            ledger.note(migration, "measured", measurement(number, share))


def save_verification(ledger: Ledger, migration: Migration, document: dict[str, Any]) -> None:
    plan = ledger.latest_plan(migration.id)
    assert plan is not None
    assert migration.old_encoder_id is not None
    assert migration.new_encoder_id is not None
    ledger.save_verification(
        migration, plan_fingerprint=plan.fingerprint, old_encoder_id=migration.old_encoder_id,
        new_encoder_id=migration.new_encoder_id, queries_sha256="ab" * 32, outcome=document["outcome"],
        results=document,
    )  # fmt: skip


def _train(folder: Path, ledger: Ledger, migration: Migration) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["epoch,classification,anchor,lr,images_per_second,self,cross,old,p1"]
    for n in range(1, 13):
        losses, scores = (7 * math.exp(-n / 4), 8 * math.exp(-n / 5)), (0.9 - 0.4 / n, 0.8 - 0.6 / n, 0.51)
        rows.append(",".join(f"{value:.4f}" for value in (n, *losses, 0.001, 250, *scores, 0.5 - 0.1 / n)))
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    number = ledger.start_training(migration.id, method="advbct", settings={}, folder=str(folder))
    validation = {"self": 0.87, "cross": 0.75, "old": 0.51, "reverse": 0.6, "procrustes": 0.42}
    ledger.finish_training(number, encoder_id=migration.new_encoder_id, validation=validation, error=None)


def _move_to_backfill(ledger: Ledger, migration: Migration) -> None:
    new, old = migration.new_encoder_id, migration.old_encoder_id
    route = {
        "epoch": 0, "query_encoder": old, "query_collection": migration.source, "canary_encoder": new,
        "canary_collection": migration.source, "canary_percent": 100.0, "write_encoders": [old], "salt": "pepper",
        "phase": "canary",
    }  # fmt: skip
    moved = ledger.move(migration, stage="backfill", state="active", event="backfill", route=route, old_kept=True)
    ledger.add_chunks(moved.id, 0, [(None if n == 0 else n * 10 - 1, n * 10 + 9, 10) for n in range(12)])


def measurement(number: int, share: float) -> dict[str, Any]:
    gain = 0.27 + 0.06 * share
    return {
        "run": number, "items_done": round(120 * share), "items_total": 120, "share": share, "metric": "map@100",
        "value": 0.647 + gain, "interval": {"mean": gain, "low": gain - 0.02, "high": gain + 0.02},
        "forecast": 0.64 + gain, "outcome": "ok",
        "read_back": {"checked": 24, "mismatched": 0, "worst_cosine": 0.99999},
    }  # fmt: skip


def results(world: World) -> dict[str, Any]:
    """A verification that passed, with every key that one may have."""
    paths = sorted(path.name for path in world.images.iterdir())
    return {
        "outcome": "pass", "reasons": ["map@100 gains 0.276"], "interval": {"mean": 0.276, "low": 0.251, "high": 0.301},
        "served": "cross", "evidence": "results of the query's class count as relevant", "kind": "labels",
        "metric": "map@100", "confidence": 0.975, "interim_analysis": 2, "minimum_detectable": 0.012,
        "tests": {test: _metrics(value) for test, value in _QUALITY.items()},
        "intervals": {test: _around(_metrics(value)) for test, value in _QUALITY.items()},
        "differences": {
            test: _around({name: at - _metrics(_QUALITY["baseline"])[name] for name, at in _metrics(value).items()})
            for test, value in _QUALITY.items()
            if test != "baseline"
        },
        "accepted": False, "next_steps": [],
        "findings": [
            *(_finding(test, gain) for test, gain in (("cross", 0.276), ("lowest", 0.27), ("self", 0.33))),
            {"metric": "negative_flips", "bound": "value <= 0.05", "segment": "shoes", "outcome": "inconclusive",
             "queries": 12, "interval": None, "minimum_detectable": None,
             "reason": "12 queries are too few to say: about 210 would do"},
        ],
        "flips": {"negative": 0.01, "positive": 0.06}, "scores": {"p_up": 0.49, "p_comp": 0.71, "p_1": 0.58},
        "overlap": {"overlap@10": 0.7},
        "classes": {"count": 10, "worst": [
            {"name": f"kind {n}", "queries": 30, "old": 0.6, "new": 0.6 + gain, "gain": gain, "low": gain - 0.05,
             "high": gain + 0.05, "negative_flips": 0.03}
            for n, gain in enumerate((-0.04, 0.02, 0.11, 0.2, 0.31))
        ]},
        "segments": None,
        "curve": {
            "metric": "map@100", "shares": SHARES, "order": "id",
            "worth": {"mean": 0.01, "low": 0.004, "high": 0.016},
            "lowest": {"share": 0.2, "value": 0.917, "gain": {"mean": 0.27, "low": 0.245, "high": 0.295}},
            "orders": {
                "id": {"values": [0.923 + 0.06 * s for s in SHARES], "auc": 0.953},
                "worst_first": {"values": [0.923 + 0.06 * s**0.5 for s in SHARES], "auc": 0.963},
            },
        },
        "histograms": {
            "edges": [-1 + 2 * n / BINS for n in range(BINS + 1)],
            "tests": {test: {"positives": _bell(0.7), "negatives": _bell(0.1)} for test in _QUALITY},
        },
        "shift": "right pairs are 0.12 more similar than today: move fixed cut-offs with them",
        "examples": [_example(paths, n) for n in range(3)],
        "query_set": {"sha256": "ab" * 32, "drawn_at": "2026-11-25T12:00:00+00:00", "kind": "labels", "queries": 300,
                      "gallery": 120, "skipped": {"queries_without_answer": 4}},
        "queries": 300, "queries_without_relevant_items": 2, "queries_without_old_vector": 0, "gallery": 120,
        "gallery_gone": 3, "unreadable": {"broken.png": "image 'broken.png' cannot be decoded"},
        "live": {"tests": {"baseline": {"map@100": 0.61}}, "index_recall": {"k": 10, "baseline": 0.98}, "items": 120},
    }  # fmt: skip


def with_loss(document: dict[str, Any]) -> dict[str, Any]:
    """The same verification, of an encoder that ends worse than today by leave of the gate."""
    loss = {
        "accepted": True,
        "note": "worse by 0.049; accepted by your gate (min_gain -0.07)",
        "bound": "gain >= -0.07",
    }
    findings = [_finding("cross", 0.03), _finding("lowest", -0.064, **loss), _finding("self", -0.049, **loss)]
    return {**document, "accepted": True, "findings": findings}


def before_tests(document: dict[str, Any]) -> dict[str, Any]:
    """A verification as versions kept it whose gate looked at the served test alone."""
    known = ("metric", "bound", "segment", "outcome", "interval", "queries", "minimum_detectable", "reason")
    findings = [{key: finding[key] for key in known} for finding in document["findings"][:1]]
    return {**{key: at for key, at in document.items() if key not in ("accepted", "next_steps")}, "findings": findings}


STRANGE = (
    "<script>window.stolen = 1</script>",
    '"><img src=x onerror=window.stolen=1>',
    "javascript:window.stolen=1",
    "' onmouseover='window.stolen=1",
    "</style></svg><b>{{ 7 * 7 }}",
    "$\\frac{1}{0}$ %s {0}",
    "back\u202ewards \u2066isolated\u2069 \u200b\ufeff",
    "nul\x00 bell\x07 esc\x1b[31m line\nfeed\u2028 half\ud800",
    "شجرة 木 🧑‍🌾 e\u0301",
    "w" * 20_000,
)
"""What somebody may have written into a label, a payload, a path or a reason."""


def hostile(document: Any, _at: list[int] | None = None) -> Any:
    """The document with a strange text for every text that a stranger could have written, each in its turn."""
    at = [0] if _at is None else _at
    if isinstance(document, dict):
        found = {key: value if key in _OURS else hostile(value, at) for key, value in document.items()}
        if "unreadable" in document:
            found["unreadable"] = {text: text for text in STRANGE}
            found["examples"] = [*document["examples"][:-1], *hostile(document["examples"][-1:], at)]
        return found
    if isinstance(document, list):
        return [hostile(value, at) for value in document]
    if isinstance(document, str):
        at[0] += 1
        return STRANGE[at[0] % len(STRANGE)]
    return document


_OURS = ("outcome", "served", "metric", "order", "tests", "intervals", "differences", "curve", "histograms")
_QUALITY = {"baseline": 0.647, "cross": 0.923, "self": 0.977, "reverse": 0.71}


def _finding(test: str, gain: float, **changes: Any) -> dict[str, Any]:
    around = {"mean": gain, "low": gain - 0.025, "high": gain + 0.025}
    return {
        "metric": "map@100", "bound": "gain >= 0", "segment": None, "outcome": "pass", "queries": 300,
        "interval": around, "minimum_detectable": 0.012, "reason": "the whole interval lies above 0", "test": test,
        "accepted": False, "note": None, "gain": around, "share": 0.2 if test == "lowest" else None,
        "queries_needed": None, **changes,
    }  # fmt: skip


def _metrics(value: float) -> dict[str, float]:
    return {"map@100": value, "recall@1": min(1.0, value + 0.02), "ndcg@10": value - 0.01, "mrr@100": value}


def _around(values: dict[str, float]) -> dict[str, Any]:
    return {name: {"mean": value, "low": value - 0.025, "high": value + 0.025} for name, value in values.items()}


def _bell(middle: float) -> list[int]:
    return [round(1000 * math.exp(-(((-1 + 2 * (n + 0.5) / BINS) - middle) ** 2) / 0.03)) for n in range(BINS)]


def _example(paths: list[str], number: int) -> dict[str, Any]:
    def answers(right: int) -> list[dict[str, Any]]:
        return [
            {"id": n if n % 2 else str(n), "path": paths[(7 * number + n) % len(paths)], "label": f"kind {n % 3}",
             "relevant": n < right}
            for n in range(5)
        ]  # fmt: skip

    return {
        "class": f"kind {number}", "query": {"path": paths[number], "label": f"kind {number}"},
        "old": answers(2), "new": answers(4), "old_value": 0.41, "new_value": 0.86,
    }  # fmt: skip
