"""The whole of `migrator verify`, and the health checks after backfill runs, on a real FAISS folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migrator.cli import run
from migrator.documents import DOCUMENTS
from migrator.project import Project
from tests.world import NAME, World, embed_images

Migrator = Callable[..., int]
NAMES = [f"{number:05d}.png" for number in range(120)]
KINDS = np.array([number % 3 for number in range(120)])


@pytest.fixture
def told(migrator: Migrator, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Runs a command with --json: exit code, document (None where there is none), stderr."""

    def call(*words: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = migrator(*words, "--json")
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return call


Told = Callable[..., tuple[int, Any, str]]


def plain(
    queries: np.ndarray, gallery: np.ndarray, asked: list[int], kinds: np.ndarray, k: int = 100
) -> dict[str, float]:
    """Mean metrics by plain loops: items ask for their like, never for themselves."""
    found: dict[str, list[float]] = {"map@100": [], "recall@1": [], "precision@10": [], "ndcg@10": [], "mrr@100": []}
    for row, item in enumerate(asked):
        scores = gallery.astype(np.float64) @ queries[row].astype(np.float64)
        order = [at for at in np.argsort(-scores, kind="stable") if at != item]
        right = [kinds[at] == kinds[item] for at in order]
        total = sum(right)
        ranks = [rank for rank, hit in enumerate(right[:k], start=1) if hit]
        found["map@100"].append(sum(number / rank for number, rank in enumerate(ranks, start=1)) / min(k, total))
        found["recall@1"].append(float(right[0]))
        found["precision@10"].append(sum(right[:10]) / 10)
        gained = sum(hit / np.log2(rank + 1) for rank, hit in enumerate(right[:10], start=1))
        found["ndcg@10"].append(gained / sum(1 / np.log2(rank + 1) for rank in range(1, min(10, total) + 1)))
        found["mrr@100"].append(1 / ranks[0] if ranks else 0.0)
    return {metric: float(np.mean(values)) for metric, values in found.items()}


def test_the_four_tests_are_what_plain_loops_give_and_the_questions_stay(
    world: World, migrator: Migrator, told: Told
) -> None:
    assert migrator("plan") == 0
    code, first, _ = told("verify", "--live")
    assert code == 0
    asked = [NAMES.index(path) for path in json.loads(query_set_file(world).read_text())["query_set"]["paths"]]
    assert len(asked) == 60
    old, new = embed_images(world, "old", NAMES), embed_images(world, "new", NAMES)
    pairs = {"baseline": (old, old), "cross": (new, old), "self": (new, new), "reverse": (old, new)}
    for test, (queries, gallery) in pairs.items():
        expected = plain(queries[asked], gallery, asked, KINDS)
        assert {metric: first["tests"][test][metric] for metric in expected} == pytest.approx(expected, abs=1e-6), test
    # The gallery is the whole collection and its index exact: the index answers as the exact search does.
    for test in ("baseline", "cross"):
        assert first["live"]["tests"][test] == pytest.approx(first["tests"][test], abs=1e-6)
        assert first["live"]["index_recall"][test] == 1.0
    # The curve begins with the cross-test and ends with the self-test, in either order.
    for found in first["curve"]["orders"].values():
        assert found["values"][0] == pytest.approx(first["tests"]["cross"]["map@100"])
        assert found["values"][-1] == pytest.approx(first["tests"]["self"]["map@100"])
    curve = first["curve"]
    assert curve["lowest"]["value"] == min(curve["orders"]["id"]["values"])
    today = first["tests"]["baseline"]["map@100"]
    assert curve["lowest"]["gain"]["mean"] == pytest.approx(curve["lowest"]["value"] - today)
    # Three tests share what the first interim analysis may err.
    assert (first["interim_analysis"], first["confidence"], first["kind"]) == (
        1,
        pytest.approx(1 - 0.025 / 3),
        "labels",
    )
    findings = {finding["test"]: finding for finding in first["findings"]}
    assert list(findings) == ["cross", "lowest", "self"]
    for test in ("cross", "self"):
        assert findings[test]["interval"]["mean"] == pytest.approx(first["tests"][test]["map@100"] - today)
    assert findings["lowest"]["gain"] == curve["lowest"]["gain"]
    assert findings["lowest"]["share"] == curve["lowest"]["share"]
    # 60 queries have 39 right answers each, without themselves.
    for counts in first["histograms"]["tests"].values():
        assert sum(counts["positives"]) == 60 * 39
        assert sum(counts["negatives"]) <= 60 * 80

    code, again, _ = told("verify")
    assert (again["interim_analysis"], again["query_set"], again["tests"]) == (1, first["query_set"], first["tests"])

    world.configure(verify__seed=1)
    code, nothing, err = told("verify")
    assert (code, nothing) == (3, None)
    assert "verify.seed is 1, and was 0" in err
    assert "--resample-queries" in err
    code, other, _ = told("verify", "--resample-queries")
    assert other["query_set"]["sha256"] != first["query_set"]["sha256"]
    assert (other["interim_analysis"], other["confidence"]) == (2, pytest.approx(1 - 0.05 / 6 / 3))


def query_set_file(world: World) -> Path:
    (found,) = (world.folder / "artifacts" / NAME).glob("query-set-*/query_set.json")
    return found


def test_thresholds_and_segments_decide(world: World, migrator: Migrator, told: Told) -> None:
    rows = "".join(
        f'{name},{"de" if at % 2 else "fr"},"[{at + 3}, {at + 6}]","[1, 3]"\n' for at, name in enumerate(NAMES[:80])
    )
    (world.folder / "queries.csv").write_text(f"path,shop,relevant,grades\n{rows}")
    world.configure(
        verify__queries="queries.csv",
        verify__segment="{shop}",
        verify__sample=80,
        verify__gate__thresholds=[
            {"metric": "ndcg@5", "min": 0.9},
            {"metric": "mrr@10", "min_gain": -1.0, "segment": "*"},
            {"metric": "recall@10", "min_gain": -1.0, "segment": "it"},
            {"metric": "negative_flips", "max": 1.0, "test": "lowest"},
            {"metric": "ndcg@5", "min": 0.0, "test": "self"},
        ],
    )
    assert migrator("plan") == 0
    code, found, _ = told("verify")
    assert (code, found["outcome"], found["kind"]) == (3, "fail", "relevant")
    outcomes = [(finding["metric"], finding["segment"], finding["outcome"]) for finding in found["findings"]]
    assert outcomes[:2] == [("map@100", None, "pass")] * 2
    assert [finding["test"] for finding in found["findings"]] == [
        "cross",
        "lowest",
        "self",
        *["cross"] * 4,
        "lowest",
        "self",
    ]
    assert outcomes[2:] == [
        ("map@100", None, "pass"),
        ("ndcg@5", None, "fail"),
        ("mrr@10", "de", "pass"),
        ("mrr@10", "fr", "pass"),
        ("recall@10", "it", "inconclusive"),
        ("negative_flips", None, "pass"),
        ("ndcg@5", None, "pass"),
    ]
    assert found["segments"]["count"] == 2
    assert {group["name"]: group["queries"] for group in found["segments"]["worst"]} == {"de": 40, "fr": 40}
    assert "ndcg@5" in found["reasons"][0]
    assert migrator("rollout", "--stage", "prepare") == 3


def test_without_labels_altered_views_are_asked_and_said_to_be_weak(
    world: World, migrator: Migrator, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    world.configure(verify={"sample": 30, "gate": {"min_gain": -1.0, "resamples": 200}})
    assert migrator("plan") == 0
    code, found, _ = told("verify", "--live")
    assert (code, found["kind"]) == (0, "instance")
    assert "near-copies" in found["evidence"]
    assert 0 < found["tests"]["self"]["recall@10"] <= 1
    assert 0 <= found["overlap"]["overlap@10"] <= 1
    assert found["classes"] is None
    assert found["live"]["tests"]["cross"] == pytest.approx(found["tests"]["cross"], abs=1e-6)
    assert migrator("verify") == 0
    assert "near-copies" in capsys.readouterr().out


def to_backfill(migrator: Migrator) -> None:
    for words in [("plan",), ("verify",), ("rollout", "--stage", "prepare")]:
        assert migrator(*words) == 0
    assert migrator("rollout", "--stage", "canary") == 0
    assert migrator("rollout", "--stage", "backfill") == 0


def health_checks(world: World) -> list[dict[str, Any]]:
    with Project.open(world.config) as project:
        return [event.detail for event in project.ledger.events(project.migration().id) if event.event == "measured"]


def test_each_run_is_looked_at_and_a_result_below_the_gate_pauses(
    world: World, migrator: Migrator, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    to_backfill(migrator)
    assert migrator("backfill", "--max-items", "60") == 0
    (first,) = health_checks(world)
    assert first["read_back"] == {"checked": 60, "mismatched": 0, "mismatched_items": [], "worst_cosine": 1.0}
    assert (first["items_done"], first["items_total"], first["share"], first["outcome"]) == (60, 120, 0.5, "ok")
    # The sampled gallery is the collection, so the forecast for half of it is what half of it gives.
    assert first["value"] == pytest.approx(first["forecast"], abs=1e-6)

    world.configure(verify__gate__min_gain=0.9)
    code, summary, _ = told("backfill", "--max-items", "10")
    assert (code, summary["ended"]) == (3, "paused")
    assert "search fell below the gate at 58% of the backfill: map@100 gain" in summary["message"]
    assert summary["next"] == f"migrator resume {NAME}"
    assert (health_checks(world)[-1]["outcome"], health_checks(world)[-1]["interim_analysis"]) == ("below the gate", 2)
    assert migrator("backfill") == 0  # a pause that was there before is no news
    assert len(health_checks(world)) == 2

    # The gate is as it was again; without the files of the verification search cannot be evaluated, and it says so.
    world.configure(verify__gate__min_gain=-1.0)
    shutil.rmtree(query_set_file(world).parent)
    assert migrator("resume") == 0
    capsys.readouterr()
    assert migrator("backfill") == 0
    assert (
        "50 items read back, 0 mismatched; the query set of the verification is not in the" in capsys.readouterr().out
    )
    assert "outcome" not in health_checks(world)[-1]


def test_vectors_that_are_not_the_encoders_pause_the_backfill(
    world: World, migrator: Migrator, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    from migrator.adapters.faiss.store import FaissStore

    to_backfill(migrator)
    right = FaissStore.write_vectors

    def shifted(self: FaissStore, ids: Any, vectors: np.ndarray, stamp: str | None, expected: Any = None) -> Any:
        """Each item gets its neighbour's vector, with the right stamp: no count and no checksum notices."""
        return right(self, ids, np.roll(vectors, 1, axis=0), stamp, expected)

    monkeypatch.setattr(FaissStore, "write_vectors", shifted)
    world.configure(backfill__measure=False)
    code, summary, _ = told("backfill", "--max-items", "20")
    assert (code, summary["ended"]) == (3, "paused")
    assert "of 20 items read back, for instance" in summary["message"]
    assert "rollback" in summary["message"]
    (seen,) = health_checks(world)
    assert seen["read_back"]["mismatched"] > 10  # of random encoders some neighbours are alike
    assert "outcome" not in seen
    code, _, err = told("rollout", "--stage", "cutover")
    assert code == 3
    assert "chunks are not done" in err or "paused" in err


def test_a_shadow_is_asked_once_it_is_whole(world: World, migrator: Migrator, told: Told) -> None:
    world.configure(rollout__strategy="shadow")
    for words in [("plan",), ("verify",), ("rollout", "--stage", "prepare"), ("rollout", "--stage", "backfill")]:
        assert migrator(*words) == 0
    assert migrator("backfill", "--max-items", "50") == 0
    assert migrator("backfill") == 0
    part, whole = health_checks(world)
    assert (part["read_back"]["checked"], part["read_back"]["mismatched"]) == (50, 0)
    assert "value" not in part
    assert told("verify")[0] == 0, "the collection itself is as it was, and a long backfill may outlive max_age"
    verified = told("verify", "--mixed")[1]
    with Project.open(world.config) as project:
        found = project.ledger.latest_verification(project.migration().id)
        assert found is not None
    assert found.results["served"] == "self"
    assert found.results["curve"] is None
    assert whole["value"] == pytest.approx(found.results["tests"]["self"]["map@100"], abs=1e-6)
    assert verified["mixed"]["map@100"] == pytest.approx(found.results["tests"]["cross"]["map@100"], abs=1e-6)


def test_the_plan_expects_what_a_sample_shows(world: World, migrator: Migrator, told: Told) -> None:
    _, planned, _ = told("plan")
    forecast = planned["forecast"]
    old, new = embed_images(world, "old", NAMES), embed_images(world, "new", NAMES)
    everyone = list(range(120))  # fewer than a sample holds
    assert forecast["sampled"] == 120
    assert forecast["today"] == pytest.approx(plain(old, old, everyone, KINDS)["map@100"], abs=1e-4)
    assert [point["share"] for point in forecast["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert forecast["points"][0]["value"] == pytest.approx(plain(new, old, everyone, KINDS)["map@100"], abs=1e-4)
    assert forecast["points"][-1]["value"] == pytest.approx(plain(new, new, everyone, KINDS)["map@100"], abs=1e-4)
    half = np.concatenate([new[:60], old[60:]])
    assert forecast["points"][2]["value"] == pytest.approx(plain(new, half, everyone, KINDS)["map@100"], abs=1e-4)
    days = [point["at"] for point in forecast["points"]]
    assert days == sorted(days)


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"verify__label": "{colour}"}, 2, "colour"),
        ({"verify__queries": "nowhere.csv"}, 2, "nowhere.csv"),
        ({"images__root": "./old.safetensors.d"}, 4, "old.safetensors.d"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(
    world: World, migrator: Migrator, told: Told, changes: dict[str, Any], code: int, reason: str
) -> None:
    assert migrator("plan") == 0
    world.configure(**changes)
    if "images__root" in changes:
        assert migrator("plan") == code  # where the images lie is a fact of the plan
        return
    found, nothing, err = told("verify")
    assert (found, nothing) == (code, None)
    assert reason in err
    assert len(err.strip().splitlines()) == 1
    with Project.open(world.config) as project:
        assert project.ledger.latest_verification(project.migration().id) is None


def test_images_that_cannot_be_read_take_no_part_and_none_is_an_error(
    world: World, migrator: Migrator, told: Told
) -> None:
    assert migrator("plan") == 0
    for name in NAMES[:20]:
        (world.images / name).write_bytes(b"no image")
    _, found, _ = told("verify")
    assert set(found["unreadable"]) >= set(NAMES[:20])
    assert found["gallery"] == 100
    for name in NAMES[20:]:
        (world.images / name).write_bytes(b"no image")
    code, nothing, err = told("verify")
    assert (code, nothing) == (3, None)
    assert "none of 60 query images could be read" in err


def test_files_of_a_verification_before_version_0007_are_read(world: World, migrator: Migrator, told: Told) -> None:
    to_backfill(migrator)
    pinned = query_set_file(world)
    earlier = pinned.parent.with_name(pinned.parent.name.replace("query-set-", "questions-"))
    pinned.parent.rename(earlier)
    document = json.loads((earlier / pinned.name).read_text())
    (earlier / pinned.name).unlink()
    document["questions"] = document.pop("query_set")
    (earlier / "questions.json").write_text(json.dumps(document))
    with np.load(earlier / "baseline.npz") as found:
        arrays = {{"first_relevant": "firsts_right"}.get(name, name): found[name] for name in found.files}
    (earlier / "baseline.npz").unlink()
    np.savez(earlier / "answers.npz", **arrays)
    assert told("backfill", "--max-items", "60")[0] == 0
    (check,) = health_checks(world)
    assert (check["outcome"], check["value"]) == ("ok", pytest.approx(check["forecast"], abs=1e-6))


def test_each_document_has_the_schema_that_is_printed(
    migrator: Migrator, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(command: str, *words: str) -> None:
        code, document, _ = told(command, *words)
        assert code == 0
        model = DOCUMENTS[command]
        whole = model.model_validate(document, extra="forbid")
        assert json.loads(whole.model_dump_json(by_alias=True, exclude_unset=True)) == document
        capsys.readouterr()
        assert run(["schema", command]) == 0
        schema = json.loads(capsys.readouterr().out)
        assert schema["properties"].keys() == document.keys()
        assert schema["properties"]["format"]["const"] == document["format"]

    check("status")
    check("plan")
    check("report")
    check("verify", "--live")
    for words in (("prepare",), ("canary",), ("backfill",)):
        assert migrator("rollout", "--stage", *words) == 0
    check("route")
    assert migrator("backfill", "--max-items", "60") == 0
    check("status")
    assert migrator("verify", "--mixed") == 0
    check("report")
