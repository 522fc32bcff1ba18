"""What the verbs share: options, the question before a change, tables, progress."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from migrator.errors import Refused, UsageProblem

if TYPE_CHECKING:
    from migrator.project import Project

F = TypeVar("F", bound=Callable[..., Any])

PLAIN_EVERY = 5.0
"""Seconds between progress lines where there is no terminal."""


def migration_options(command: F) -> F:
    """NAME and --config, as every verb on a migration takes them."""
    command = click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        default=Path("migrations.yaml"),
        show_default=True,
        help="The configuration file.",
    )(command)
    return click.argument("name", required=False)(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")


def open_project(config_path: Path, name: str | None) -> Project:
    """The migration that the command is about."""
    from migrator.project import Project

    return Project.open(config_path, name)


def confirm(says: str, *, yes: bool) -> None:
    """Says what is about to happen and asks, unless `yes`. Refuses where nobody can answer."""
    click.echo(f"About to {says}.", err=True)
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():  # None: started with its input closed
        raise UsageProblem("nobody can answer here: add --yes")
    if not click.confirm("Go on?", err=True):
        raise Refused("not confirmed, nothing was changed")


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps({"format": 1, **document}, indent=2, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout; columns after the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a cell's brackets are not markup
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Name and value, a line each, on stdout; what is None is left out."""
    known = [(name, str(value)) for name, value in facts if value is not None]
    width = max(len(name) for name, _ in known)
    for name, value in known:
        click.echo(f"{name:<{width}}  {value}")


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, text="")

        def advance(done: int, total: int, text: str = "") -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield advance


@contextmanager
def _plain(what: str) -> Iterator[Advance]:
    """Says every few seconds how far it is, also while nothing moves: a server may keep the first answer waiting."""
    latest = "started"
    finished = threading.Event()

    def advance(done: int, total: int, text: str = "") -> None:
        nonlocal latest
        latest = f"{done} of {total} {text}".rstrip()

    def tell() -> None:
        while not finished.wait(PLAIN_EVERY):
            click.echo(f"{what}: {latest}", err=True)

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield advance
    finally:
        finished.set()
        teller.join()
