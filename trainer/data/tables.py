"""CSV and Parquet files that list images: one reader for `verify.queries` and `train.items`."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from migrator.trainer.errors import TableProblem
from migrator.trainer.images.templates import NotText, text_of
from migrator.trainer.text import one_line

if TYPE_CHECKING:
    from pathlib import Path

MAX_CELL = 1 << 24
"""Characters of a CSV cell."""
MAX_NAMES = 10
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True)
class Header:
    """The names of a file's columns, without spaces at their ends."""

    file: Path
    names: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def seen(self) -> str:
        """The names in a row, shortened; what a message shows."""
        shown = [name if name.isprintable() else repr(name) for name in self.names[:MAX_NAMES]]
        shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in shown]
        return ", ".join(shown + ["..."] * (len(self.names) > MAX_NAMES)) or "none"

    def require(self, name: str, advice: str) -> None:
        """Raises TableProblem where a column is missing; `advice` follows unless a name is nearly the same."""
        if name not in self.names:
            raise self.missing((name,), advice)

    def missing(self, wanted: Sequence[str], advice: str, *, cutoff: float = 0.75) -> TableProblem:
        """The problem that no column is called so, or with several that none of them is there."""
        none = " and ".join(f"no column {name}" for name in wanted)
        near = next((close for name in wanted if (close := self.near(name, cutoff=cutoff)) is not None), None)
        if near is not None:
            advice = f"did you mean {near[1]!r}? Rename it to {near[0]}"
        return TableProblem(f"{self.file} has {none} (it has: {self.seen}): {advice}")

    def near(self, name: str, *, cutoff: float = 0.75) -> tuple[str, str] | None:
        """`name`, and the column that it seems to be misspelled as."""
        others = {other.lower(): other for other in reversed(self.names)}
        close = difflib.get_close_matches(name, others, n=1, cutoff=cutoff)
        return (name, others[close[0]]) if close else None


@dataclass(frozen=True)
class Table:
    """The columns that were chosen, with a cell for each row."""

    file: Path
    header: Header
    columns: dict[str, list[Any]]
    sha256: str
    """Of the file's bytes, in hex."""
    lines: Sequence[int] | None
    """The line on which each row begins; None where a file has no lines."""

    def place(self, row: int) -> str:
        """Where a row, counted from 0, is found in the file."""
        return f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"

    def texts(self, name: str, *, list_advice: str = "") -> list[str]:
        """A column of which every cell must hold one value, as text without spaces at the ends.

        Raises TableProblem where cells are empty or hold a list (`list_advice` follows then) or a structure.
        """
        column: list[str] = []
        for row, cell in enumerate(self.columns[name]):
            try:
                column.append((text_of(cell) or "").strip())
            except NotText as problem:
                raise TableProblem(
                    f"{self.file}: {self.place(row)}: {name} is {problem}"
                    f"{list_advice or ': write one value, as text or a number'}"
                ) from None
        self.require_filled(name, column)
        return column

    def require_filled(self, name: str, column: Sequence[object]) -> None:
        """Raises TableProblem where a value of a column is empty."""
        empty = [row for row, value in enumerate(column) if not value]
        if empty:
            raise TableProblem(
                f"{self.file}: {name} missing in {len(empty)} of {len(column)} rows (first: {self.place(empty[0])}): "
                "fill it in with text or a number, or remove these rows"
            )


def read_table(file: Path, choose: Callable[[Header], Sequence[str]], *, what: str, key: str) -> Table:
    """Reads the columns that `choose` picks from a header; others are not kept.

    A .csv file is UTF-8 with commas and a first line of names; spaces round a name do not count. The hash is of the
    bytes that were read. `what` the file lists and the configuration's `key` are for messages.

    Raises TableProblem where the file cannot be read, or two of the chosen columns have one name; `choose` may too.
    """
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(file.suffix.lower())
    if read is None:
        raise TableProblem(f"{file}: {what} are read from a .csv or .parquet file: rename or convert it")
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "no such file"
        raise TableProblem(f"{file}: {state}: set {key} to a .csv or .parquet file that lists {what}")

    def chosen(names: Sequence[str]) -> list[str]:
        header = Header(file, tuple(names))
        columns = list(dict.fromkeys(choose(header)))
        twice = [name for name, count in Counter(names).items() if count > 1 and name in columns]
        if twice:
            raise TableProblem(f"{file} has two columns {twice[0]} (it has: {header.seen}): keep one")
        return columns

    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            names, columns, lines = read(file, stream, chosen)
    except (OSError, ValueError, OverflowError) as error:
        raise TableProblem(f"{file} cannot be read: {one_line(error)}") from error
    return Table(file, Header(file, tuple(names)), columns, sha256, lines)


_Read = tuple[Sequence[str], dict[str, list[Any]], Sequence[int] | None]


def _read_csv(file: Path, stream: IO[bytes], chosen: Callable[[Sequence[str]], list[str]]) -> _Read:
    if stream.read(2) in _UTF16:
        raise TableProblem(f"{file} is UTF-16 text: save it as UTF-8")
    stream.seek(0)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    lines = array("q")
    begin = 1
    with _long_cells():
        reader = csv.reader(text, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            where = _places(file, names, chosen)
            columns: dict[str, list[Any]] = {name: [] for name in where}
            begin = reader.line_num + 1
            for cells in reader:
                if cells:  # not an empty line
                    if len(cells) > len(names):
                        raise TableProblem(
                            f"{file}: line {begin} has {len(cells)} cells, the first line names {len(names)}: put text "
                            'with commas in quotes, such as "[17, ""a-9""]"'
                        )
                    lines.append(begin)
                    for name, place in where.items():
                        columns[name].append(cells[place] if place < len(cells) else None)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise TableProblem(
                f"{file}: the row that begins on line {begin} cannot be read: {one_line(error)}: check its quotes"
            ) from error
        except UnicodeDecodeError as error:
            raise TableProblem(f"{file}: line {_undecodable(stream)} is not UTF-8 text: save it as UTF-8") from error
        finally:
            text.detach()  # the stream is closed where it was opened
    return names, columns, lines


def _places(file: Path, names: Sequence[str], chosen: Callable[[Sequence[str]], list[str]]) -> dict[str, int]:
    """Where the chosen columns are."""
    try:
        return {name: names.index(name) for name in chosen(names)}
    except TableProblem:
        marks = [mark for mark in _DELIMITERS if len(names) == 1 and mark in names[0]]
        if not marks:
            raise
        raise TableProblem(
            f"{file} is separated by {_DELIMITERS[marks[0]]} (its first line: {Header(file, tuple(names)).seen!r}): "
            "save it with commas, or as Parquet"
        ) from None


def _undecodable(stream: IO[bytes]) -> int:
    stream.seek(0)
    for number, line in enumerate(stream, start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 1


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of up to MAX_CELL characters. The limit is one of the process, so it is put back."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(file: Path, stream: IO[bytes], chosen: Callable[[Sequence[str]], list[str]]) -> _Read:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = [str(name).strip() for name in table.schema_arrow.names]
        spelled = dict(zip(names, table.schema_arrow.names, strict=True))
        columns: dict[str, list[Any]] = {name: [] for name in chosen(names)}
        for batch in table.iter_batches(columns=[spelled[name] for name in columns]):
            for name, values in columns.items():
                values.extend(batch.column(spelled[name]).to_pylist())
    except pyarrow.ArrowException as error:
        raise TableProblem(f"{file} is not a readable Parquet file: {one_line(error)}") from error
    return names, columns, None
