"""The report in a real browser: it needs nothing but itself, fits every screen, and can be printed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from migrator.cli import run
from tests.browser import chromium
from tests.reported import fill_ledger, hostile, plan_world, results
from tests.world import World

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

WIDTHS = (320, 400, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(ignore_default_args=["--hide-scrollbars"]) as started:
        yield started


@pytest.fixture(scope="module")
def pages(_first_world: World, tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> dict[str, Path]:
    """`walked`: a world that went through plan, verify, rollout and a backfill run; `full`: a ledger with all that a
    report can show, written by strangers. Asks for the browser first: without one nothing is made."""
    walked = World(tmp_path_factory.mktemp("walked") / "world")
    shutil.copytree(_first_world.folder, walked.folder)
    walked.configure(rollout__canary=[100])
    plan_world(walked)
    full = World(tmp_path_factory.mktemp("full") / "world")
    shutil.copytree(walked.folder, full.folder)
    walk(walked)
    fill_ledger(full, **hostile(results(full)))
    found = {"walked": walked.folder / "report.html", "full": full.folder / "report.html"}
    for page in found.values():
        assert run(["report", "--config", str(page.with_name("migrations.yaml")), "--out", str(page)]) == 0
    return found


def walk(world: World) -> None:
    steps = ["verify", "rollout --stage prepare", "rollout --stage canary", "rollout --stage backfill"]
    for step in [*steps, "backfill --max-items 50"]:
        verb, *words = step.split()
        assert run([verb, "--config", str(world.config), *words, *([] if verb == "verify" else ["--yes"])]) == 0


def opened(context: BrowserContext, file: Path) -> tuple[Page, list[str], list[str]]:
    """The page, what its console said, and what it asked the network for."""
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return page, said, [url for url in asked if url != file.as_uri() and not url.startswith("data:")]


@pytest.mark.parametrize("which", ["walked", "full"])
@pytest.mark.parametrize("scripts", [True, False], ids=["script", "no-script"])
def test_it_opens_without_a_word_and_without_the_network(
    browser: Browser, pages: dict[str, Path], which: str, scripts: bool
) -> None:
    context = browser.new_context(java_script_enabled=scripts)
    page, said, asked = opened(context, pages[which])
    assert (said, asked) == ([], [])
    assert page.title() == "toys: report"
    assert page.locator("h2").count() == 12
    assert page.locator("#verdict").is_visible()
    for part, drawings in (("#backfill", 1), ("#scores", 4)):  # `walked`: what verify and backfill really keep
        assert page.locator(f"{part} svg[role=img]").count() == drawings
    assert page.locator("#examples img").count() > 0
    if scripts:
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("typeof window.stolen") == "undefined"
    context.close()


@pytest.mark.parametrize("which", ["walked", "full"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(browser: Browser, pages: dict[str, Path], which: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800})
    page, _, _ = opened(context, pages[which])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = """[...document.querySelectorAll("section *")].filter(element => {
        const box = element.getBoundingClientRect();
        return box.right > innerWidth + 1 && box.width && !element.closest(".scroll, .unseen, .results small");
    }).map(element => element.outerHTML.slice(0, 200))"""
    assert page.evaluate(wide) == []
    context.close()


@pytest.mark.parametrize("which", ["walked", "full"])
def test_a_table_that_is_wider_than_a_phone_scrolls_and_shows_it(
    browser: Browser, pages: dict[str, Path], which: str
) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page, _, _ = opened(context, pages[which])
    scrollers = page.evaluate("""[...document.querySelectorAll(".scroll")].map(element => {
        const style = getComputedStyle(element), borders = 2 * parseFloat(style.borderTopWidth);
        const bar = element.offsetHeight - element.clientHeight - borders, wide = element.scrollWidth;
        element.scrollLeft = wide;
        const cells = [...element.querySelectorAll("tr > :last-child")].map(cell => cell.getBoundingClientRect());
        return {
            wide, room: element.clientWidth, bar, overflow: style.overflowX, shadow: style.backgroundAttachment,
            end: Math.max(...cells.map(cell => cell.right)), edge: element.getBoundingClientRect().right,
            focus: element.tabIndex,
        };
    })""")
    context.close()
    wider = [each for each in scrollers if each["wide"] > each["room"]]
    assert len(wider) >= 5
    for each in wider:
        assert (each["overflow"], each["focus"]) == ("auto", 0)
        assert each["bar"] >= 8, "nothing shows that there is more"
        assert each["shadow"] == "local, local, scroll, scroll"
        assert each["end"] <= each["edge"] + 1, "its right edge cannot be reached"
        assert each["wide"] < 1500, "a text without end makes the table as wide"
    assert all(each["bar"] == 0 for each in scrollers if each not in wider)


def test_every_picture_is_there(browser: Browser, pages: dict[str, Path]) -> None:
    context = browser.new_context()
    page, _, _ = opened(context, pages["full"])
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 33 - 11
    assert all(0 < width <= 96 for width in widths)
    assert page.locator(".noimage").count() == 11
    drawings = page.evaluate("[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().height)")
    assert len(drawings) >= 8
    assert all(height > 50 for height in drawings)
    context.close()


def test_it_is_dark_where_the_reader_likes_it_dark(browser: Browser, pages: dict[str, Path]) -> None:
    found = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page, _, _ = opened(context, pages["full"])
        colours = """['body', 'figure svg text', 'h2'].map(where => {
            const style = getComputedStyle(document.querySelector(where));
            return where === 'body' ? style.backgroundColor : where === 'h2' ? style.color : style.fill;
        })"""
        found[scheme] = [luminance(colour) for colour in page.evaluate(colours)]
        context.close()
    assert found["light"][0] > 0.8 > 0.4 > max(found["light"][1:])
    assert found["dark"][0] < 0.1 < 0.3 < min(found["dark"][1:])


def luminance(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / (3 * 255)


@pytest.mark.parametrize("which", ["walked", "full"])
def test_it_can_be_printed(browser: Browser, pages: dict[str, Path], which: str) -> None:
    context = browser.new_context(color_scheme="dark")
    page, _, _ = opened(context, pages[which])
    printed = page.pdf(format="A4", print_background=True)
    assert printed.startswith(b"%PDF-")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) < 40
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    context.close()
