"""The items of a FAISS collection: the rows of one or several Parquet files, in the order of their names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from migrator.adapters.base import ItemId, StoreRejected
from migrator.adapters.faiss.payload import joined
from migrator.adapters.files import translated

if TYPE_CHECKING:
    import pyarrow as pa

MAX_NAMED = 3
"""Rows, files and problems of a kind that a message names."""
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ItemsFile:
    """One of the files."""

    path: Path
    count: int
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class Items:
    """The rows of all files, in the order of their ids."""

    ids: Sequence[ItemId]  # ascending
    faiss_ids: NDArray[np.int64] | None
    """The column `faiss_id`, if there is one."""
    rows: NDArray[np.int64]
    """Row numbers, counted through all files."""
    payload: pa.Table
    """The other columns, by row number."""
    files: Sequence[ItemsFile]
    strings: bool
    """Whether ids are strings."""
    numbered: bool
    """There is no column `id`: the row number is the id."""

    def empty_table(self) -> pa.Table:
        """A table without items and with the same columns, and one of ids where there is none."""
        import pyarrow as pa

        first = self.files[0].schema
        known = {name: self.payload.schema.field(name) for name in self.payload.schema.names}
        fields = [known.get(field.name, field) for field in first]
        fields += [field for name, field in known.items() if name not in first.names]
        if self.numbered:
            fields.insert(0, pa.field("id", pa.int64()))
        return pa.schema(fields, first.metadata).empty_table()

    def file_table(
        self, file: ItemsFile, ids: Sequence[ItemId], faiss_ids: NDArray[np.int64], payload: pa.Table, *, with_ids: bool
    ) -> pa.Table:
        """What a file holds of these items: its columns, in their order and types.

        `with_ids` adds a column of ids. Payload values that do not fit a column of this file alone widen it to the type
        that it has over all files.
        """
        import pyarrow as pa

        columns: dict[str, Any] = {name: payload.column(name) for name in payload.schema.names}
        columns["id"] = pa.array(ids, pa.large_string() if self.strings else pa.int64())
        columns["faiss_id"] = pa.array(faiss_ids)
        fields, arrays = list(file.schema), []
        if with_ids:
            fields.insert(0, pa.field("id", pa.int64()))
        held = {field.name for field in fields}
        fields += [
            field for field in payload.schema if field.name not in held and columns[field.name].null_count < len(ids)
        ]
        for place, field in enumerate(fields):
            column = columns[field.name]
            if column.type != field.type:
                try:
                    column = column.cast(field.type)
                except pa.ArrowException:
                    fields[place] = field.with_type(column.type)
            arrays.append(column)
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields, file.schema.metadata))


def read_items(files: Sequence[Path], live: Callable[[Path], Path]) -> Items:
    """The items of these files, each read where `live` says that it is.

    Raises `StoreRejected` with everything that is wrong: ids must be of one type, none missing, none twice.
    """
    import pyarrow as pa

    problems: list[str] = []
    tables: dict[Path, pa.Table] = {}
    for path in files:
        try:
            tables[path] = _checked(path, read_parquet(live(path)))
        except StoreRejected as error:
            problems.append(str(error))
    numbered = not any("id" in table.schema.names for table in tables.values())
    ids: list[ItemId] = []
    labels: list[NDArray[np.int64]] = []
    kinds: dict[bool, Path] = {}
    labelled = any("faiss_id" in table.schema.names for table in tables.values())
    for path, table in tables.items():
        if numbered:
            ids += range(len(ids), len(ids) + len(table))
        else:
            with _noted(problems):
                found = _plain(table, path, "id")
                kinds.setdefault(not pa.types.is_integer(found.type), path)
                ids += found.to_pylist()
        if labelled:
            with _noted(problems):
                labels.append(_plain(table, path, "faiss_id").to_numpy())
    if len(kinds) > 1:
        problems.append(
            f"{kinds[True]} has strings in its column `id`, {kinds[False]} has integers: write one type to all files"
        )
    elif not problems and not numbered:
        problems += _twice(ids, [(path, len(table)) for path, table in tables.items()])
    payload = None
    if not problems:
        try:
            payload = _payload(list(tables.values()))
        except (pa.ArrowException, ValueError) as error:
            problems.append(f"{_several(files)} have columns of types that do not fit each other ({_line(error)})")
    if problems or payload is None:
        raise StoreRejected(listed(problems))
    rows = np.arange(len(ids)) if numbered else np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    faiss_ids = np.concatenate(labels) if labels else None
    return Items(
        ids if numbered else [ids[row] for row in rows],
        None if faiss_ids is None else faiss_ids[rows],
        rows,
        payload,
        [ItemsFile(path, len(table), table.schema) for path, table in tables.items()],
        strings=True in kinds,
        numbered=numbered,
    )


def listed(problems: Sequence[str]) -> str:
    """Problems as one line; of many the first ones."""
    shown = [*dict.fromkeys(problems)]
    more = len(shown) - 2 * MAX_NAMED
    if more > 0:
        shown = [*shown[: 2 * MAX_NAMED], f"and {more} more of the kind"]
    return "; ".join(shown)


def read_parquet(path: Path) -> pa.Table:
    """The table in a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Not read_table(path): below a folder called a=b it adds a column `a`.
    with translated(path), path.open("rb") as file:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                return parquet.read()
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise StoreRejected(f"{path} cannot be read as Parquet: truncated or not one ({_line(error)})") from error


def write_parquet_like(path: Path, table: pa.Table, file: IO[bytes]) -> None:
    """Writes a table in the way in which the file `path` was written: compression and size of row groups."""
    import pyarrow.parquet as pq

    before = pq.read_metadata(path)
    groups = [before.row_group(number) for number in range(min(before.num_row_groups, 1))]
    options: dict[str, Any] = {}
    if groups and groups[0].num_columns:
        options["compression"] = groups[0].column(0).compression.lower().replace("uncompressed", "none")
        if before.num_row_groups > 1:
            options["row_group_size"] = max(1, groups[0].num_rows)
    pq.write_table(table, file, **options)


def _checked(path: Path, table: pa.Table) -> pa.Table:
    """The table, if its columns can be told apart and their texts are text."""
    import pyarrow as pa

    names = table.schema.names
    if len(set(names)) < len(names):
        raise StoreRejected(f"{path} has two columns of the same name: rename one of them")
    for name in names:
        try:
            table.column(name).validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            raise StoreRejected(
                f"{path}: the column `{name}` cannot be read ({_line(error)}): write it again as UTF-8 text"
            ) from error
    return table


@contextlib.contextmanager
def _noted(problems: list[str]) -> Any:
    try:
        yield
    except StoreRejected as error:
        problems.append(str(error))


def _plain(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    """A column of ids as int64 or, for `id`, large strings. Raises `StoreRejected`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if name not in table.schema.names:
        raise StoreRejected(
            f"{path} has no column `{name}`, which other files have: its columns are "
            f"{', '.join(table.schema.names) or 'none'}; write it to all files, or to none"
        )
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise StoreRejected(
            f"{path}: the column `{name}` has {column.null_count} empty rows ({_named(rows)}): every item needs one, "
            f"so fill them or remove these rows from items and index"
        )
    kind = column.type
    if pa.types.is_integer(kind):
        if pa.types.is_uint64(kind) and len(column) and pc.max(column).as_py() > _LARGEST:
            rows = np.flatnonzero(column.to_numpy() > np.uint64(_LARGEST))
            way_out = "write the ids as strings" if name == "id" else "give these vectors smaller ids"
            raise StoreRejected(
                f"{path}: the column `{name}` has integers above {_LARGEST}, the largest that an index can hold "
                f"({_named(rows)}): {way_out}"
            )
        return column.cast(pa.int64())
    if name == "faiss_id":
        raise StoreRejected(f"{path}: the column `faiss_id` must be integers, it is {kind}: write it as int64")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.large_string())
    examples = ", ".join(repr(value) for value in column.slice(0, MAX_NAMED).to_pylist()) if len(column) else "none"
    raise StoreRejected(
        f"{path}: the column `id` must be integers or strings, it is {kind} (first rows: {examples}): {_way_out(kind)}"
    )


def _way_out(kind: pa.DataType) -> str:
    import pyarrow as pa

    rename = "or rename the column, and the row number is the id"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return f"write it as int64, {rename}"
    return f"write it as text, {rename}"


def _twice(ids: Sequence[ItemId], files: Sequence[tuple[Path, int]]) -> list[str]:
    seen: dict[ItemId, int] = {}
    for row, item in enumerate(ids):
        first = seen.setdefault(item, row)
        if first != row:
            one, other = (_place(at, files) for at in (first, row))
            many = len(ids) - len(set(ids))
            rest = f" ({many} such rows)" if many > 1 else ""
            where = f"rows {one[1]} and {other[1]}"
            if one[0] != other[0]:
                where = f"row {one[1]}, and row {other[1]} of {other[0]}"
            return [
                f"{one[0]} holds the id {item!r} more than once ({where}){rest}: ids must be unique; remove the "
                "repeated items from items and index, or rename the column `id`, and the row number is the id"
            ]
    return []


def _place(row: int, files: Sequence[tuple[Path, int]]) -> tuple[Path, int]:
    for path, count in files:
        if row < count:
            return path, row
        row -= count
    raise AssertionError("a row beyond the files")


def _payload(tables: Sequence[pa.Table]) -> pa.Table:
    """The payload columns of all files as one table; where types differ, as the wider one."""
    import pyarrow as pa

    payloads = [
        table.drop_columns([name for name in ("id", "faiss_id") if name in table.schema.names]) for table in tables
    ]
    schema = payloads[0].schema
    if any(payload.schema != schema for payload in payloads):
        payloads = [_decoded(payload) for payload in payloads]
        schema = pa.unify_schemas([payload.schema for payload in payloads], promote_options="permissive")
        payloads = [_as(payload, schema) for payload in payloads]
    return joined(payloads, schema).combine_chunks()


def _decoded(payload: pa.Table) -> pa.Table:
    """Dictionary columns as plain ones: files may have it one way and the other."""
    import pyarrow as pa

    kinds = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in payload.schema
    ]
    return payload.cast(pa.schema(kinds, payload.schema.metadata))


def _as(payload: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [
        payload.column(field.name).cast(field.type)
        if field.name in payload.schema.names
        else pa.nulls(len(payload), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _named(rows: NDArray[np.int64]) -> str:
    """The first of some row numbers, for people."""
    shown = ", ".join(str(row) for row in rows[:MAX_NAMED].tolist())
    more = len(rows) - MAX_NAMED
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


def _several(files: Sequence[Path]) -> str:
    shown = ", ".join(str(path) for path in files[:MAX_NAMED])
    return shown + (f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else "")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
