"""What the verbs share: options, the question before a change, tables, progress."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from migrator import formatting
from migrator.errors import InUse, PreconditionFailed, UsageProblem

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

    from migrator.project import Project

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

PLAIN_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""
WAIT_STEP = 0.5
"""Seconds between two tries to get a store that another process holds."""
PLAIN_WIDTH = 110
"""Of tables where there is no terminal."""
NARROW = 100
"""Below this many characters a line, a table does without its frame."""
SPEED_PERIOD = 600.0
"""Seconds over which the speed is measured that the time left is computed."""


config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("migrations.yaml"),
    show_default=True,
    help="The configuration file.",
)


def migration_options(command: F) -> F:
    """NAME and --config, as every verb on a migration takes them."""
    return click.argument("name", required=False)(config_option(command))


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")


def open_project(config_path: Path, name: str | None) -> Project:
    """The migration that the command is about."""
    from migrator.project import Project

    return Project.open(config_path, name)


def confirm(summary: str, *, yes: bool) -> None:
    """Says what is about to happen and asks for consent, unless `yes`. Refuses where nobody can answer."""
    say(f"About to {summary}.", err=True)
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():  # None: started with its input closed
        raise UsageProblem("nobody can answer here: add --yes")
    if not click.confirm("Continue?", err=True):
        raise PreconditionFailed("not confirmed, nothing was changed")


wait_option = click.option(
    "--wait",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="How long to wait for a store that another process holds, such as a backfill run.",
)


def waiting(action: Callable[[], T], *, seconds: float, again: Callable[[], T] | None = None) -> T:
    """What `action` gives, tried for `seconds` while another process holds the store; from then on `again`, if given.

    Says once that it waits. Raises `StoreBusy` or `InUse` when the time is over.
    """
    from migrator.adapters.base import StoreBusy

    until = monotonic() + seconds
    announced = False
    while True:
        try:
            return action()
        except (StoreBusy, InUse) as busy:
            if monotonic() >= until:
                if not seconds:
                    raise type(busy)(f"{busy}; --wait SECONDS waits for that") from busy
                raise
            if not announced:
                say(f"{busy}: waiting up to {formatting.duration(seconds)}", err=True)
                announced = True
        action = again or action
        sleep(WAIT_STEP)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps({"format": 1, **document}, indent=2, allow_nan=False))


def say(text: str = "", *, err: bool = False, hanging: str = "", colour: str | None = None) -> None:
    """A sentence on stdout, or stderr: on a terminal with lines broken between words, else as it is, for `grep`."""
    width = terminal_width(sys.stderr if err else sys.stdout)
    click.secho(text if width is None else formatting.wrapped(text, width, hanging=hanging), err=err, fg=colour)


def terminal_width(stream: TextIO | None) -> int | None:
    """Characters in a line of the terminal that `stream` is; None where it is none."""
    if stream is None or not stream.isatty():
        return None
    return shutil.get_terminal_size().columns


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout; columns after the first are right-aligned."""
    from rich.console import Console

    console = Console(width=terminal_width(sys.stdout) or PLAIN_WIDTH)
    console.print(table_of(header, rows, width=console.width, title=title))


def table_of(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int, title: str | None = None
) -> RenderableType:
    """A table that fits `width`. Where all of it has no room, texts are wrapped between words; numbers stay whole."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    narrow = width < NARROW
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD,
        pad_edge=not narrow,
        padding=(0, 1, 0, 0) if narrow else (0, 1),
    )
    for number, name in enumerate(header):
        cells = [name, *(row[number] for row in rows)]
        values = [cell for cell in cells[1:] if cell]
        is_text = any(" " in cell for cell in values)
        longest = max((len(word) for cell in cells for word in cell.split()), default=0)
        table.add_column(
            name,
            justify="left" if number == 0 else "right",
            overflow="fold",
            # Down to its longest word, and not further than a third of the line: a path may be longer than that.
            min_width=min(longest, width // 3) if is_text else longest if longest <= width // 3 else None,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a cell's brackets are not markup
    return table


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Name and value, a line each, on stdout; what is None is omitted. On a terminal values are wrapped."""
    known = [(name, str(value)) for name, value in facts if value is not None]
    width = max(len(name) for name, _ in known)
    for name, value in known:
        say(f"{name:<{width}}  {value}", hanging=" " * (width + 2))


Advance = Callable[..., None]


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A bar on stderr, or a plain line now and then where there is no terminal.

    Gives a function to call with (done, total, text).
    """
    if not sys.stderr.isatty():
        with _plain(what) as plain:
            yield plain
        return
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, text="")
        known: int | None = None

        def advance(done: int, total: int, text: str = "") -> None:
            nonlocal known
            if total != known:  # another part of the work: its speed is its own
                bar.reset(task, total=total)
                known = total
            bar.update(task, completed=done, total=total, text=text)

        yield advance


def progress_bar(console: Console) -> Progress:
    """What is done, a bar, how much of how much, the time left, then a text that gets what is left of the line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=min(40, console.width // 5), table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
        console=console,
        transient=True,
        expand=True,
        # Reports may be minutes apart; from one report in the period no time left can be computed.
        speed_estimate_period=SPEED_PERIOD,
    )


@contextmanager
def _plain(what: str) -> Iterator[Advance]:
    """Says every few seconds how far it is, also while nothing moves: a server may keep the first answer waiting."""
    latest = "started"
    finished = threading.Event()

    def advance(done: int, total: int, text: str = "") -> None:
        nonlocal latest
        latest = f"{done} of {total} {text}".rstrip()

    def report() -> None:
        while not finished.wait(PLAIN_EVERY):
            click.echo(f"{what}: {latest}", err=True)

    reporter = threading.Thread(target=report, name="progress", daemon=True)
    reporter.start()
    try:
        yield advance
    finally:
        finished.set()
        reporter.join()


@contextmanager
def stop_on_signal(after: str) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()
        say(f"stopping after this {after}; again to leave at once", err=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
