"""The file of `verify.queries`: a table of query images, each with its class or its relevant items."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.adapters.base import ItemId
from migrator.errors import ConfigError
from migrator.formatting import quoted
from migrator.labels import Tags
from migrator.trainer.data.tables import Header, Table, read_table
from migrator.trainer.errors import ImageProblem, TableProblem
from migrator.trainer.images.templates import NotText, is_list, parse
from migrator.verify.query_set.rows import Queries

if TYPE_CHECKING:
    from migrator.trainer.images.source import ImageSource

MAX_GRADE = 1e9


def read_queries(file: Path, segment: str | None, images: ImageSource) -> tuple[Queries, Table]:
    """What the file lists, a query for each image, and the file as it was read. Raises `ConfigError`."""
    named = () if segment is None else parse(segment).fields

    def choose(header: Header) -> list[str]:
        header.require("path", "its first line names the columns path and label")
        if "label" not in header and "relevant" not in header:
            raise header.missing(
                ("label", "relevant"), "give the class of each query, or the ids of its relevant items"
            )
        for name in ("label", "relevant", "grades"):
            if name not in header and header.near(name, cutoff=0.85):
                raise header.missing((name,), "", cutoff=0.85)
        if "grades" in header and "relevant" not in header:
            has = f"(it has: {header.seen})"
            raise TableProblem(f"{file} has a column grades and no column relevant {has}: name the graded items there")
        columns = [name for name in ("path", "label", "relevant", "grades") if name in header]
        return columns + [_column_of(field, header) for field in named]

    try:
        table = read_table(file, choose, what="queries", key="verify.queries")
        return _checked(table, segment, images), table
    except TableProblem as problem:
        raise ConfigError(str(problem)) from problem


def _column_of(field: str, header: Header) -> str:
    """The column that holds a field of verify.segment: one with its name, or the structure that it is a field of."""
    steps = field.split(".")
    for count in range(len(steps), 0, -1):
        if (name := ".".join(steps[:count])) in header:
            return name
    raise header.missing((field,), "verify.segment names it")


def _checked(table: Table, segment: str | None, images: ImageSource) -> Queries:
    """One query for each image. An image that is listed again with the same relevant items counts once."""
    file, columns = table.file, table.columns
    count = len(columns["path"])
    if not count:
        raise ConfigError(f"{file} lists no queries: add rows with a path, and a label or relevant items")
    paths = [_below_root(path, table, row, images) for row, path in enumerate(table.texts("path"))]
    tags = _tag_column(table) if "label" in columns else None
    relevant = _relevant(table) if "relevant" in columns else None
    segments = None if segment is None else _segments(table, segment)
    given = {"label": tags, "relevant": relevant, "segment": segments}
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        earlier = first.setdefault(path, row)
        for name, column in given.items():
            if column is not None and column[earlier] != column[row]:
                raise ConfigError(
                    f"{file}: {table.place(row)} gives {quoted(path)} another {name} than {table.place(earlier)} "
                    "does: "
                    "keep one"
                )
    return Queries(paths, tags, segments, [None] * count, relevant, list(range(count))).at(first.values())


def _below_root(path: str, table: Table, row: int, images: ImageSource) -> str:
    try:
        return images.below_root(path)
    except ImageProblem as problem:
        raise ConfigError(f"{table.file}: {table.place(row)}: {problem}: correct or remove it") from None


def _tag_column(table: Table) -> list[Tags]:
    """The classes of each query: text or a number, a list of them, or in a CSV file JSON text of a list of texts."""
    if not any(is_list(cell) or _json_texts(cell) is not None for cell in table.columns["label"]):
        return [(text,) for text in table.texts("label")]
    column: list[Tags] = []
    for row, cell in enumerate(table.columns["label"]):
        try:
            column.append(parse("{label}").fill_each({"label": _json_texts(cell) or cell}))
        except NotText as problem:
            where = f"{table.file}: {table.place(row)}"
            raise ConfigError(f"{where}: {problem}: write text, or a list of texts") from None
    table.require_filled("label", column)
    return column


def _json_texts(cell: Any) -> list[str] | None:
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else None


def _segments(table: Table, segment: str) -> list[str]:
    template = parse(segment)
    names = [name for name in table.columns if name not in ("path", "label", "relevant", "grades")]
    names += [name for name in template.fields if name in table.columns and name not in names]
    segments = []
    for row in range(len(table.columns["path"])):
        try:
            values = {name: _trimmed(table.columns[name][row]) for name in names}
            segments.append((template.fill(values) or "").strip())
        except NotText as problem:
            raise ConfigError(f"{table.file}: {table.place(row)}: {problem}; a query belongs to one segment") from None
    if not any(segments):
        raise ConfigError(
            f"{table.file}: the columns that verify.segment names ({', '.join(template.fields)}) are empty"
        )
    return segments


def _trimmed(cell: Any) -> Any:
    return cell.strip() if isinstance(cell, str) else cell


def _relevant(table: Table) -> list[dict[ItemId, float]]:
    """The relevant items of each row, with their grades."""
    grades = table.columns.get("grades")
    rows: list[dict[ItemId, float]] = []
    for row, cell in enumerate(table.columns["relevant"]):
        try:
            items = _list(cell, "relevant", '[17, "a-9"]')
            for item in items:
                if isinstance(item, bool) or not isinstance(item, int | str) or not _fits(item):
                    raise ValueError(f"{quoted(item)} in relevant is no item id: ids are whole numbers or text")
            if len(set(items)) < len(items):
                raise ValueError(f"relevant lists {quoted(Counter(items).most_common(1)[0][0])} twice: keep one")
            gains = [1.0] * len(items) if grades is None else _list(grades[row], "grades", "[3, 1]")
            if len(gains) != len(items):
                raise ValueError(f"{len(gains)} grades for {len(items)} relevant items: give one for each")
            for gain in gains:
                if isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 < gain <= MAX_GRADE:
                    raise ValueError(f"{quoted(gain)} is no grade: give numbers above 0, up to {MAX_GRADE:.0e}")
        except ValueError as error:
            raise ConfigError(f"{table.file}: {table.place(row)}: {error}") from None
        rows.append({item: float(gain) for item, gain in zip(items, gains, strict=True)})
    return rows


def _list(cell: Any, name: str, example: str) -> list[Any]:
    """A list column's cell, or JSON text of a list."""
    value = cell
    if isinstance(cell, str):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise ValueError(f"{name} is no JSON list such as {example}: {quoted(cell)}; [] says that there is none")
    return value


def _fits(item: int | str) -> bool:
    """Whether any store could have such an id: a number has 64 bits."""
    return isinstance(item, str) or -(2**63) <= item < 2**64
