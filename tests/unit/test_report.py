"""The report: what it says at each stage, that it takes nothing on trust, and that it is written whole or not."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from migrator import formatting
from migrator.cli import run
from migrator.errors import PreconditionFailed
from migrator.project import Project
from migrator.report import charts, page
from migrator.report.facts import _health_check, facts_of, finite
from migrator.report.thumbnails import SIDE, Thumbnail, thumbnails
from migrator.report.verdict import verdict
from migrator.trainer.errors import ImageProblem, ImagesUnavailable
from migrator.trainer.images.source import ImageSource
from migrator.training_runs import read_epochs
from tests.reported import (
    STRANGE,
    before_tests,
    fill_ledger,
    hostile,
    measurement,
    plan_world,
    results,
    save_verification,
    with_loss,
)
from tests.world import NAME, World

SECTIONS = [
    "verdict", "now", "quality", "gate", "backfill", "changes", "examples", "scores", "training", "plan", "log",
    "evidence",
]  # fmt: skip


@pytest.fixture(scope="module")
def planned(_first_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a plan and no more; not to be changed."""
    world = World(tmp_path_factory.mktemp("planned") / "world")
    shutil.copytree(_first_world.folder, world.folder)
    plan_world(world)
    return world


@pytest.fixture
def fresh(planned: World, tmp_path: Path) -> World:
    """A planned world to go on with."""
    shutil.copytree(planned.folder, tmp_path / "world")
    return World(tmp_path / "world")


@pytest.fixture(scope="module")
def full(planned: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with everything in its ledger; not to be changed."""
    world = World(tmp_path_factory.mktemp("full") / "world")
    shutil.copytree(planned.folder, world.folder)
    fill_ledger(world)
    return world


@pytest.fixture(scope="module")
def facts(full: World) -> dict[str, Any]:
    with Project.open(full.config) as project:
        return facts_of(project)


def plain(facts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The facts without what is drawn, so that a page takes milliseconds; `changes` are laid over the results."""
    light = copy.deepcopy(facts)
    light["training"]["epochs"] = []
    light["measured"] = []
    light["plan"]["forecast"] = None
    light["verification"]["results"] |= {"curve": None, "histograms": None, **changes}
    return light


def report(world: World, *words: str) -> int:
    return run(["report", "--config", str(world.config), *words])


class Page(HTMLParser):
    """What a browser would make of the page, as far as it matters here."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_page_lies_beside_the_artifacts_and_its_path_is_printed(full, capsys):
    assert report(full) == 0
    path = full.folder / "artifacts" / NAME / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    told = Page(path.read_text())
    assert [value for value in told.values("id") if value in SECTIONS] == SECTIONS
    assert not list(path.parent.glob("*.tmp"))


def test_where_artifacts_are_elsewhere_the_page_lies_here(fresh, tmp_path, monkeypatch, capsys):
    document = yaml.safe_load(fresh.config.read_text())
    fresh.config.write_text(yaml.safe_dump({**document, "artifacts": "memory://somewhere"}))
    monkeypatch.chdir(tmp_path)
    assert report(fresh) == 0
    assert capsys.readouterr().out == f"{NAME}-report.html\n"
    assert (tmp_path / f"{NAME}-report.html").is_file()


def test_json_prints_the_same_facts_and_writes_nothing(full, facts, capsys):
    before = sorted(full.folder.rglob("*"))
    assert report(full, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("format") == 1
    assert {**printed, "made_at": ""} == {**facts, "made_at": ""}
    assert "pepper" not in json.dumps(printed)  # the route's salt
    assert sorted(full.folder.rglob("*")) == before
    assert report(full, "--json", "--out", "x.html") == 2


def test_neither_a_model_nor_a_store_is_needed(full, tmp_path):
    for name in ("old.safetensors", "new.safetensors"):
        (full.folder / name).rename(tmp_path / name)
    full.gallery.rename(tmp_path / "gallery")
    try:
        assert report(full, "--out", str(tmp_path / "report.html")) == 0
    finally:
        for name in ("old.safetensors", "new.safetensors", "gallery"):
            (tmp_path / name).rename(full.folder / name)


@pytest.mark.parametrize(
    ("out", "says"),
    [("folder", "is no file"), ("missing/report.html", "does not exist: make it"), ("/dev/null", "is no file")],
)
def test_a_place_where_no_file_can_be(planned, tmp_path, monkeypatch, capsys, out, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert report(planned, "--out", out) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_a_page_that_cannot_be_written_leaves_the_one_before(planned, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.html"
    out.write_text("before")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    assert report(planned, "--out", str(out)) == 4
    assert "No space left on device: nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert out.read_text() == "before"


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_what_draws_the_page_may_be_missing(planned, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert report(planned) == 2
    assert capsys.readouterr().err == f"migrator: a report needs {module}: pip install 'advbct-migrator[report]'\n"
    assert report(planned, "--json") == 0


def test_before_the_first_plan_there_is_nothing_to_report(world):
    with Project.open(world.config) as project, pytest.raises(PreconditionFailed, match="no plan yet"):
        facts_of(project)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_in_a_sentence(planned):
    with Project.open(planned.config) as project:
        facts = facts_of(project)
    facts["plan"]["forecast"] = None
    told = Page(page.render(facts, {})).text
    assert "Not verified yet: old and new search have not been compared. migrator verify toys does it." in told
    for sentence in (
        "Not verified yet: migrator verify toys forecasts the curve", "Nothing was measured during the backfill yet.",
        "Not verified yet: migrator verify toys picks examples.", "Nothing was trained in this migration.",
        "No route yet: migrator rollout toys --stage prepare writes it.",
    ):  # fmt: skip
        assert sentence in told
    assert "None" not in re.sub(r"None were found", "", told)


def test_everything_that_is_known_is_told(facts):
    told = Page(page.render(facts, {})).text
    for known in (
        "search scores 0.923 with the new encoder at the canary and 0.647 today: 0.276 better",
        "between +0.251 and +0.301, with 97.5 % confidence", "1 % of the queries the first result was relevant",
        "The class that loses most is “kind 0”: −0.040 over 30 queries.", "migrator backfill toys",
        "P_up 0.490, P_comp 0.710, P_1 0.580", "12 queries are too few to say: about 210 would do", "gain >= 0",
        "by beginning with the worst items: +0.010 mAP@100", "24 checked", "70 %", "Right pairs are 0.12 more similar",
            "Search is worst at 20 %: 0.917, +0.270 over today", "98 %", "Index recall is the share of the first 10",
        "mAP@100 on images held out", "ab" * 32, "2 queries without a relevant item", "4 queries without answer",
        "broken.png", "interim analysis 2", facts["plan"]["fingerprint"], "0.953",
    ):  # fmt: skip
        assert known in told, known


@pytest.mark.parametrize(
    ("changes", "answer", "begins"),
    [
        ({}, "yes", "Yes: the new encoder may answer queries."),
        ({"stage": "backfill"}, "yes", "Yes: the new encoder answers queries"),
        ({"outcome": "fail"}, "no", "No: the new encoder must not"),
        ({"outcome": "inconclusive"}, "open", "Not yet:"),
        ({"invalid_reason": "was verified on 2026-01-01, longer ago than verify.max_age"}, "open", "It passed, but"),
        ({"invalid_reason": "was verified long ago", "stage": "backfill"}, "yes", "Yes:"),
        (
            {"invalid_reason": "was verified long ago", "stage": "backfill", "strategy": "shadow"},
            "open",
            "It passed, but",
        ),
        ({"outcome": "fail", "invalid_reason": "was verified long ago"}, "no", "No:"),
        ({"state": "finished", "stage": "finalize"}, "yes", "Done:"),
        ({"state": "rolling_back"}, "back", "Rolling back"),
        ({"state": "rolled_back"}, "back", "Rolled back: the old encoder answers every query again."),
        ({"measured": [{"outcome": "below the gate"}], "stage": "backfill"}, "no", "Stop:"),
        ({"measured": [{"outcome": "below the gate"}, {"outcome": "ok"}, {}]}, "yes", "Yes:"),
        ({"measured": [{"outcome": "below the gate"}], "state": "rolled_back"}, "back", "Rolled back"),
        ({"verification": None}, "open", "Not verified yet"),
        ({"verification": None, "new_encoder": None}, "open", "Not known yet: there is no new encoder."),
    ],
)
def test_the_answer(facts, changes, answer, begins):
    given = plain(facts)
    given["status"] |= {"stage": "planned", "state": "planned"}
    for key, value in changes.items():
        where = given if key in ("measured", "verification") else given["status"]
        if key in ("outcome", "invalid_reason"):
            where = given["verification"]
        where[key] = value
    found = verdict(given)
    assert found["answer"] == answer
    assert found["headline"].startswith(begins)


def test_a_loss_is_called_a_loss(facts):
    tests = {"baseline": {"map@100": 0.7}, "cross": {"map@100": 0.6}}
    given = plain(facts, tests=tests, interval={"mean": -0.1, "low": -0.12, "high": -0.08}, reasons=["too low"])
    given["verification"]["outcome"] = "fail"
    told = " ".join(verdict(given)["sentences"])
    assert "scores 0.600 with the new encoder at the canary and 0.700 today: 0.100 worse" in told
    assert "between −0.120 and −0.080" in told
    assert "Too low." in told
    same = plain(facts, tests={"baseline": tests["baseline"], "cross": tests["baseline"]})
    assert "0.700 today: the same" in " ".join(verdict(same)["sentences"])


def of_loss(facts, **status):
    """The facts of a migration that a gate let through with a loss."""
    given = plain(
        facts,
        **with_loss(
            {"tests": {"baseline": {"map@100": 0.66}, "cross": {"map@100": 0.663}, "self": {"map@100": 0.611}}}
        ),
    )
    given["verification"]["results"]["curve"] = {"lowest": {"share": 0.6, "value": 0.596}}
    given["status"] |= {"stage": "planned", "state": "planned", **status}
    return {**given, "verdict": verdict(given)}


@pytest.mark.parametrize(
    ("status", "begins"),
    [
        ({}, "After the"),
        ({"stage": "cutover", "state": "active"}, "After the"),
        ({"state": "finished"}, "Done. After the"),
    ],
)
def test_a_loss_that_the_gate_allows_is_no_success_at_any_stage(facts, status, begins):
    given = of_loss(facts, **status)
    assert given["verdict"]["answer"] == "accepted"
    assert given["verdict"]["headline"].startswith(begins)
    assert "backfill: worse by 0.049; accepted by your gate (min_gain -0.07)." in given["verdict"]["headline"]
    html = page.render(given, {})
    assert '<section id="verdict" class="verdict accepted">' in html
    top = html[html.index('<section id="verdict"') : html.index('<section id="now"')]
    assert "✓" not in top
    told = Page(top).text
    tiles = [
        " ".join(tile.split())
        for tile in re.findall(r"<div[^>]*>(.*?)</div>", re.sub(r"<(?!/?div)[^>]*>", " ", top), re.S)
    ]
    assert tiles[:4] == [
        "today 0.660",
        "canary 0.663 +0.030 ( +0.005 to +0.055 )",
        "lowest of the backfill (60 %) 0.596 −0.064 ( −0.089 to −0.039 )",
        "after the backfill 0.611 −0.049 ( −0.074 to −0.024 )",
    ]
    assert "At the lowest point of the backfill: worse by 0.049; accepted" in told
    gate = html[html.index('<section id="gate"') : html.index('<section id="backfill"')]
    assert re.findall(r'class="badge (\w+)"><span aria-hidden="true">(.)</span> (\w+)', gate) == [
        ("open", "!", "accepted"), ("good", "✓", "pass"), ("open", "!", "accepted"), ("open", "!", "accepted"),
    ]  # fmt: skip


def test_a_loss_that_an_earlier_versions_gate_did_not_look_at_is_told(facts):
    document = before_tests(facts["verification"]["results"])
    document["differences"] = {"self": {"map@100": {"mean": -0.049, "low": -0.062, "high": -0.036}}}
    given = plain(facts)
    given["verification"]["results"] = document
    given["status"] |= {"state": "finished"}
    found = verdict(given)
    assert found["answer"] == "accepted"
    assert found["headline"].startswith("Done. After the backfill: worse by 0.049; the gate of the version")
    assert found["tiles"][-1]["state"] == "worse"
    # And one whose own bound allowed it, as for a shadow.
    allowed: dict[str, Any] = {"metric": "map@100", "bound": "gain >= -0.5", "segment": None, "outcome": "pass"}
    allowed |= {"queries": 300, "interval": {"mean": -0.232, "low": -0.25, "high": -0.21}}
    given["verification"]["results"] = {**document, "served": "self", "findings": [allowed]}
    assert (
        verdict(given)["headline"] == "Done. After the backfill: worse by 0.232; accepted by your gate (min_gain -0.5)."
    )


def test_the_ways_on_are_on_the_page(facts):
    given = plain(facts)
    given["verification"]["outcome"] = "fail"
    given["status"] |= {"stage": "planned", "state": "planned", "next_command": None}
    given["status"]["next_steps"] = ["Train with another method: `migrator train toys --method bct --run bct`."]
    html = page.render({**given, "verdict": verdict(given)}, {})
    assert "<li>Train with another method: <code>migrator train toys --method bct --run bct</code>.</li>" in html
    assert "one of the next steps above" in Page(html).text


def test_items_that_do_not_hold_their_vector_are_told(facts):
    given = plain(facts)
    given["measured"] = [{**measurement(1, 0.5), "read_back": {"checked": 24, "mismatched": 3, "worst_cosine": 0.1}}]
    assert "Of 24 items that were read back after the last run, 3 did not hold" in " ".join(verdict(given)["sentences"])


def test_older_results_and_measurements_show_what_is_there(fresh):
    with Project.open(fresh.config) as project:
        migration = project.migration()
        old = {
            "outcome": "pass", "reasons": ["map@100 gain +0.2955"], "served": "cross", "queries": 300, "gallery": 100,
            "interval": {"mean": 0.2955, "low": 0.27, "high": 0.32}, "flips": {"negative": 0.0, "positive": 0.05},
            "tests": {"baseline": {"map@100": 0.6192}, "cross": {"map@100": 0.9146}}, "unreadable": {},
            "queries_without_relevant_items": 0, "queries_without_old_vector": 0,
        }  # fmt: skip
        save_verification(project.ledger, migration, old)
        project.ledger.note(migration, "measured", {"mixed": {"map@100": 0.9541}, "queries": 300})
        told = Page(page.render(facts_of(project), {})).text
    for known in ("0.915", "+0.295", "0.954", "map@100 gain +0.2955", "The last verification kept no examples."):
        assert known in told


def test_a_plans_forecast_has_its_dates_and_a_drawing(facts):
    given = plain(facts)
    points = [{"share": n / 4, "value": 0.6 + n / 20, "at": f"2026-11-2{n + 1}T12:00:00+00:00"} for n in range(5)]
    given["plan"]["forecast"] = {"points": points, "metric": "map@100", "sampled": 512, "items_per_second": 310.5}
    html = page.render(given, {})
    assert "2026-11-25 12:00" in html
    assert 'aria-labelledby="forecast-title' in html
    assert 'aria-labelledby="curve-title' in html  # planned, though neither verified nor measured
    given["plan"]["forecast"]["points"] = [{**point, "value": None} for point in points]
    html = page.render(given, {})
    assert "forecast once there is a new encoder" in html
    assert 'aria-labelledby="forecast-title' not in html


# -- the page is well made --------------------------------------------------------------------------------------------


def test_the_same_facts_give_the_same_page_and_no_id_is_given_twice(full, facts):
    with Project.open(full.config) as project:
        pictures = thumbnails(project.images, page._paths(page._examples(facts)))
    facts = {**facts, "plan": {**facts["plan"], "forecast": None}}
    html = page.render(facts, pictures)
    assert page.render(copy.deepcopy(facts), pictures) == html
    told = Page(html)
    ids = told.values("id")
    assert len(ids) == len(set(ids))
    meant = re.findall(r"url\(#([^)]+)\)", html) + [href[1:] for href in told.values("href") if href[:1] == "#"]
    meant += [href[1:] for href in told.values("xlink:href")]
    meant += [name for names in told.values("aria-labelledby") for name in names.split()]
    assert set(meant) <= set(ids)
    assert len([tag for tag, _ in told.tags if tag == "img"]) == 33
    drawn = [attributes for tag, attributes in told.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawn) == 8
    assert not re.search("#0a0b", html)  # matplotlib's marker colours became variables
    assert len(html) < 1_000_000


def test_every_tag_is_closed(facts):
    void = {"meta", "link", "img"}
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(page.render(facts, {}))
    assert open_tags == []


def cut(document: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a document, of a list's first only."""
    if path:
        yield path
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:1])
    for key, value in items:
        yield from cut(value, (*path, key))


def test_any_part_of_the_results_may_be_null_or_missing(facts, full):
    light = plain(facts)
    paths = [path for path in cut(light["verification"]["results"], ()) if isinstance(path[-1], str)]
    assert len(paths) > 100
    for path in paths:
        for gone in (False, True):
            broken = {**light, "verification": copy.deepcopy(light["verification"])}
            parent = broken["verification"]["results"]
            for key in path[:-1]:
                parent = parent[key]
            if gone:
                del parent[path[-1]]
            else:
                parent[path[-1]] = None
            broken["verdict"] = verdict(broken)
            assert "</html>" in page.render(broken, {}), path


# -- strangers --------------------------------------------------------------------------------------------------------


def test_nothing_of_a_stranger_becomes_markup(fresh):
    fill_ledger(fresh, **hostile(results(fresh)))
    with Project.open(fresh.config) as project:
        migration = project.migration()
        for text in STRANGE:
            project.ledger.note(migration, "event", {text: {"deep": [text]}})
        facts = facts_of(project)
        facts["status"]["paused"] = STRANGE[7]
        facts["events"] += [{**facts["events"][-1], "event": text, "stage": text} for text in STRANGE]
        facts["events"] = [{**event, "actor": STRANGE[n % len(STRANGE)]} for n, event in enumerate(facts["events"])]
        facts["failures"] = {
            "open": len(STRANGE),
            "items": [{"id": text, "kind": "image", "reason": text, "attempts": 1} for text in STRANGE],
        }
        facts["plan"]["risks"] = facts["plan"]["capabilities"] = list(STRANGE)
        for key in ("name", "server", "index"):
            facts["plan"]["collection"][key] = STRANGE[1]
        facts["training"]["error"] = STRANGE[0]
        facts["training"]["validation"] = dict.fromkeys(STRANGE, 0.5)
        html = page.render(facts, {})
    told = Page(html)
    tags = {tag for tag, _ in told.tags}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "input",
        "button",
        "base",
        "b",
        "x",
        "foreignobject",
    }
    assert [tag for tag, _ in told.tags].count("style") == 1
    names = {name for _, attributes in told.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("formaction", "srcdoc", "action")}
    assert all(re.fullmatch(r"#[a-z]+|data:,", href) for href in told.values("href"))
    assert told.values("src") == []
    assert "<script>window.stolen = 1</script>" in told.text  # shown as what it is
    assert "{{ 7 * 7 }}" in told.text
    assert "back[U+202E]wards [U+2066]isolated" in told.text
    assert "[U+0000] bell[U+0007] esc[U+001B][31m line feed  half[U+D800]" in told.text
    assert not {c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\u200c\u200d"}
    assert max(map(len, re.findall("w+", told.text))) <= formatting.MAX_CHARACTERS
    assert len(html.encode()) < 1_500_000


def test_the_pages_policy_lets_nothing_in(facts):
    told = Page(page.render(plain(facts), {}))
    policy = [attributes["content"] for _, attributes in told.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text_is_one_visible_line_of_bounded_length(text):
    shown = formatting.sanitized(text, 20)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Cn", "Co", "Zl", "Zp"}
    assert all(character in "\u200c\u200d" for character in shown if unicodedata.category(character) == "Cf")
    assert len(shown) <= 21 * len("[U+10FFFF]")
    shown.encode()
    if text.isascii() and text.isprintable() and len(text) <= 20:
        assert shown == text


@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(), min_size=1, max_size=40))
def test_a_label_stays_a_label(facts, text):
    def rendered(name: str) -> Page:
        worst = [{"name": name, "queries": 3, "old": 0.5, "new": 0.4, "gain": -0.1, "low": -0.2, "high": 0.0}]
        given = plain(facts, classes={"count": 1, "worst": worst}, examples=[], unreadable={name: name})
        return Page(page.render(given, {}))

    told, calm = rendered(text), rendered("x")
    assert [tag for tag, _ in told.tags] == [tag for tag, _ in calm.tags]
    assert formatting.sanitized(text) in told.text


def test_a_plot_does_not_read_formulas():
    drawn = charts.backfill_curve(
        {"shares": [0, 1], "orders": {"$x$": {"values": [0.5, 0.6]}}}, None, [], metric="$\\frac{1}{0}$@1", today=0.5
    )
    assert drawn is not None
    assert "$\\frac{1}{0}$@1" in drawn
    assert "$x$" not in drawn


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", []),
        ("a,b\n1,2\n", []),
        ("epoch,self\n1,0.5\n2,x\n", [{"epoch": 1.0, "self": 0.5}, {"epoch": 2.0}]),
        ("epoch,<script>,ok\n1,2,3,4\n", [{"epoch": 1.0, "ok": 3.0}]),
        ("epoch,self\n1\n\x00\n", [{"epoch": 1.0}]),
        ("epoch,loss\n1,nan\n", [{"epoch": 1.0, "loss": None}]),
    ],
)
def test_a_training_folder_is_read_with_care(tmp_path, text, rows):
    file = tmp_path / "metrics.csv"
    file.write_text(text)
    assert finite(read_epochs(file)) == rows
    charts.training_curves(finite(read_epochs(file)))
    assert read_epochs(tmp_path) == read_epochs(tmp_path / "none.csv") == []


def test_json_has_no_number_that_is_none():
    document = {"a": float("nan"), "b": [float("inf"), 1.5, True], 3: None}
    assert finite(document) == {"a": None, "b": [None, 1.5, True], "3": None}


# -- pictures ---------------------------------------------------------------------------------------------------------


class Source:
    """Stands for an `ImageSource`, and counts what it is asked."""

    def __init__(self, load: Callable[[str], Image.Image]) -> None:
        self.asked: list[str] = []
        self._load = load

    def open(self) -> ImageSource:
        return cast(ImageSource, self)

    def load(self, path: str) -> Image.Image:
        self.asked.append(path)
        return self._load(path)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "kind", "becomes"),
    [
        ((8, 8), "png", (8, 8)),
        ((640, 480), "jpeg", (96, 72)),
        ((30, 1000), "jpeg", (3, 96)),
        ((9000, 2), "jpeg", (96, 1)),
    ],
)
def test_a_thumbnail_is_small_and_holds_nothing_but_the_picture(size, kind, becomes):
    image = noise(*size)
    image.info |= {"icc_profile": b"secret" * 10_000, "comment": b"secret", "exif": b"secret"}
    found = thumbnails(Source(lambda _: image).open, ["a"])["a"]
    assert found.uri is not None
    head, encoded = found.uri.split(",")
    assert head == f"data:image/{kind};base64"
    data = base64.b64decode(encoded)
    assert Image.open(io.BytesIO(data)).size == becomes
    assert b"secret" not in data
    assert len(data) < 12_000
    assert max(becomes) <= SIDE
    assert image.size == size


def test_an_unreadable_image_leaves_its_place_to_a_note(facts):
    def load(path: str) -> Image.Image:
        if path == "00001.png":
            raise ImageProblem("image '00001.png' cannot be decoded: <b>\x00")
        return noise(8, 8)

    source = Source(load)
    pictures = thumbnails(source.open, ["00000.png", "00001.png", None, 7, "00001.png", "00002.png"])
    assert source.asked == ["00000.png", "00001.png", "00002.png"]
    told = Page(page.render(plain(facts), pictures))
    notes = {attributes["title"] for tag, attributes in told.tags if attributes.get("class") == "noimage"}
    assert notes == {"image '00001.png' cannot be decoded: <b>[U+0000]", "its path is not known"}


def test_a_source_that_is_away_is_asked_once_and_does_not_stop_the_report(fresh, capsys):
    def gone(path: str) -> Image.Image:
        raise ImagesUnavailable("image folder cannot be read")

    source = Source(gone)
    found = thumbnails(source.open, ["a", "b", "c"])
    assert source.asked == ["a"]
    assert set(found.values()) == {Thumbnail(None, problem="image folder cannot be read")}
    fill_ledger(fresh)
    shutil.rmtree(fresh.images)
    assert report(fresh) == 0
    told = Page(Path(capsys.readouterr().out.strip()).read_text())
    assert told.text.count("no image") == 33
    assert told.values("src") == []


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (formatting.number(0.92349), "0.923"),
        (formatting.number(None), "–"),
        (formatting.number(True), "–"),
        (formatting.signed(0.2764), "+0.276"),
        (formatting.signed(-0.0124), "−0.012"),
        (formatting.signed(-0.0001), "0.000"),
        (formatting.percent(0.0125), "1.2 %"),
        (formatting.percent(1), "100 %"),
        (formatting.percent(0.7, 0), "70 %"),
        (formatting.percent(1.0, 0), "100 %"),
        (formatting.percent("x"), "–"),
        (formatting.count(1497), "1,497"),
        (formatting.when("2026-11-25T21:39:06+01:00"), "2026-11-25 20:39"),
        (formatting.when("soon\x00"), "soon[U+0000]"),
        (formatting.when(None), "–"),
        (formatting.duration(45), "45 s"),
        (formatting.duration(7200), "2 h"),
        (formatting.size(383_232), "383 kB"),
        (formatting.size(None), "–"),
        (formatting.metric_name("map@100"), "mAP@100"),
        (formatting.metric_name("negative_flips"), "negative flips"),
        (formatting.sentence(" it rained "), "It rained."),
    ],
)  # fmt: skip
def test_numbers_and_times(made, expected):
    assert made == expected


def test_a_health_check_of_before_version_0007_is_read_in_the_terms_of_today() -> None:
    read_back = {"checked": 24, "wrong": 3, "wrong_items": [7], "worst_cosine": 0.1}
    assert _health_check({"run": 1, "look": 2, "read_back": read_back}) == {
        "run": 1,
        "interim_analysis": 2,
        "read_back": {"checked": 24, "mismatched": 3, "mismatched_items": [7], "worst_cosine": 0.1},
    }
