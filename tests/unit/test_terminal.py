"""What a terminal of 80 to 120 columns shows: whole words, a bar, the time left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from migrator import formatting
from migrator.cli import common
from migrator.cli.verify import MEANING

LOSSES = "epoch 7/12 412 images/s " + " ".join(f"{name} 12.345" for name in ("classification", "boundary", "anchor"))


def drawn(width: int, steps: list[tuple[float, int, int, str]]) -> str:
    """The last line that a progress bar shows, after reports of (seconds, done, total, text)."""
    clock = [0.0]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = common.progress_bar(console)
    bar.get_time = lambda: clock[0]
    task = bar.add_task("training", total=None, text="")
    for seconds, done, total, text in steps:
        clock[0] = seconds
        bar.update(task, completed=done, total=total, text=text)
    with console.capture() as capture:
        console.print(bar.get_renderable())
    (line,) = capture.get().splitlines()
    return line


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_bar_and_the_time_left_have_their_place_before_a_long_text(width: int) -> None:
    line = drawn(width, [(0.0, 0, 1680, LOSSES), (100.0, 100, 1680, LOSSES), (200.0, 200, 1680, LOSSES)])
    assert len(line) <= width
    assert re.search(r"training [━╸╺ ]{10,} 200/1680 0:24:40 epoch 7/12 412 images/s", line)
    assert line.rstrip().endswith("…") or "anchor 12.345" in line


def test_reports_that_are_minutes_apart_tell_the_time_left_too() -> None:
    assert "0:15:00" in drawn(80, [(0.0, 0, 10, ""), (300.0, 2, 10, ""), (600.0, 4, 10, ""), (601.0, 4, 10, "")])


TESTS = [(f"{test}: {meaning}", *(["0.9405"] * 5)) for test, meaning in MEANING.items()]
HEADER = ("test", "map@100", "recall@1", "recall@10", "ndcg@10", "mrr@100")


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        (HEADER, TESTS),
        (("run", "method", "epochs", "P_1", "self", "cross", "old", "verified"),
         [("default (candidate)", "residual_mlp", "10/12", "0.566", "0.944", "0.571", "0.543", "inconclusive")]),
        (("item", "kind", "attempts", "reason"), [("7", "image", "1", "image '00007.png' cannot be decoded")]),
    ],
    ids=["verify", "runs", "failures"],
)  # fmt: skip
@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_table_breaks_no_word_and_no_number(header: tuple[str, ...], rows: list[tuple[str, ...]], width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(common.table_of(header, rows, width=width))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    shown = re.split(r"[\s│┃]+", text)
    for cell in (*header, *(cell for row in rows for cell in row)):
        assert all(word in shown for word in cell.split()), cell


def test_a_path_that_is_longer_than_the_line_is_folded_and_not_lost() -> None:
    path = "/srv/" + "x" * 200 + "/image.png"
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(common.table_of(("item", "reason"), [("7", path)], width=80))
    assert path in re.sub(r"[\s│]", "", capture.get())


def test_sentences_are_broken_between_words_and_commands_stay_whole() -> None:
    text = "  - the plan is stale: then `migrator rollback products-v2` takes all of it back again"
    assert formatting.wrapped(text, 40, hanging="  ").splitlines() == [
        "  - the plan is stale: then",
        "    `migrator rollback products-v2`",
        "    takes all of it back again",
    ]
    assert formatting.wrapped("one\n\ntwo three", 5) == "one\n\ntwo\nthree"
    assert formatting.wrapped("/a/path-that/is/longer than", 10) == "/a/path-that/is/longer\nthan"


def test_only_a_terminal_gets_broken_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = [("plan", "word " * 40), ("old encoder", None), ("new encoder", "word " * 30)]
    common.print_facts(facts)
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(common, "terminal_width", lambda _stream: 80)
    common.print_facts(facts)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:11] for line in lines if not line.startswith(" ")] == ["plan       ", "new encoder"]
    assert all(set(line.split()) == {"word"} for line in lines if line.startswith(" "))
