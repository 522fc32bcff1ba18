"""Payload columns of a FAISS collection: carried as Arrow columns, shown as Python values.

Python's types cannot hold all that Arrow's can (nanoseconds, dictionaries, the difference between lists and large
lists). So a payload that was read is a `Row`: a dict of Python values for templates and comparison, which remembers the
Arrow row it came from. What writes payloads into a FAISS collection takes that row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from migrator.adapters.base import Payload

if TYPE_CHECKING:
    import pyarrow as pa


class Row(dict[str, Any]):
    """A payload as Python values, and the row of an Arrow table that it stands for. A changed copy is a plain dict."""

    __slots__ = ("row", "table")

    def __init__(self, values: Mapping[str, Any], table: pa.Table, row: int) -> None:
        super().__init__(values)
        self.table, self.row = table, row

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def rows(table: pa.Table, places: Any) -> list[Row]:
    """The rows of a table at these places, in this order, with values that compare and print exactly.

    A time with a part below a microsecond, or outside of the years 1 to 9999, is given as text: Python's times cannot
    hold it.
    """
    names = table.schema.names
    if not names:
        return [Row({}, table, 0) for _ in places]
    table = take(table, places)
    columns = zip(*(_values(column) for column in table.columns), strict=True)
    return [Row(dict(zip(names, values, strict=True)), table, row) for row, values in enumerate(columns)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    import pyarrow as pa

    kind = _with_leaves(column.type, _text_for_times)
    if kind == column.type:
        return list(column.to_pylist())
    if pa.types.is_dictionary(column.type):
        return _values(column.cast(column.type.value_type))
    cut = column.cast(_with_leaves(column.type, _microseconds), safe=False)
    try:
        values = list(cut.to_pylist())
    except (ValueError, OverflowError):  # a year that Python does not have
        return [_value(cut, column, kind, row) for row in range(len(column))]
    if not cut.cast(column.type, safe=False).equals(column):
        values = [_value(cut, column, kind, row) for row in range(len(column))]
    return values


def _value(cut: pa.ChunkedArray, column: pa.ChunkedArray, kind: pa.DataType, row: int) -> Any:
    exact = column.slice(row, 1)
    if cut.slice(row, 1).cast(column.type, safe=False).equals(exact):
        try:
            return cut[row].as_py()
        except (ValueError, OverflowError):
            pass
    return exact.cast(kind)[0].as_py()


def _with_leaves(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with each type in it that holds no other replaced by what `leaf` gives for it."""
    import pyarrow as pa

    def inner(field: pa.Field) -> pa.Field:
        return field.with_type(_with_leaves(field.type, leaf))

    types = pa.types
    if types.is_dictionary(kind):
        values = _with_leaves(kind.value_type, leaf)
        return kind if values == kind.value_type else values
    if types.is_struct(kind):
        return pa.struct([inner(field) for field in kind])
    if types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field), kind.keys_sorted)
    if types.is_list(kind):
        return pa.list_(inner(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(inner(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    return leaf(kind)


def _is_time(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_time64(kind))


def _text_for_times(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return pa.string() if _is_time(kind) else kind


def _microseconds(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if not _is_time(kind) or kind.unit != "ns":
        return kind
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


def _no_views(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def take(table: pa.Table, rows: Any) -> pa.Table:
    """The rows of a table at these places, in this order."""
    import pyarrow as pa

    indices = pa.array(np.asarray(rows, np.int64))
    columns = []
    for column in table.columns:
        plain = _with_leaves(column.type, _no_views)  # pyarrow has no `take` for views
        columns.append(
            column.take(indices) if plain == column.type else column.cast(plain).take(indices).cast(column.type)
        )
    return pa.Table.from_arrays(columns, schema=table.schema)


def fitting(payloads: Sequence[Payload], schema: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """Payloads as a table of the collection's columns, and why some rows do not fit; these are empty in the table.

    Payloads that were read from columns of the same types are taken over as they lie there.
    """
    tables: dict[int, pa.Table] = {}
    first: dict[int, int] = {}
    places = np.empty(len(payloads), np.int64)
    plain = []
    total = 0
    for place, payload in enumerate(payloads):
        if isinstance(payload, Row) and payload.table.schema.equals(schema):
            key = id(payload.table)
            if key not in tables:
                tables[key], first[key] = payload.table, total
                total += len(payload.table)
            places[place] = first[key] + payload.row
        else:
            plain.append(place)
    table, wrong = _converted([payloads[place] for place in plain], schema)
    places[plain] = np.arange(total, total + len(plain))
    return take(joined([*tables.values(), table], schema), places), {plain[row]: why for row, why in wrong.items()}


def joined(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Tables of the same types as one, with the metadata of `schema`."""
    import pyarrow as pa

    alike = [pa.Table.from_arrays(table.columns, schema=schema) for table in tables if len(table)]
    return pa.concat_tables(alike).unify_dictionaries() if alike else schema.empty_table()


def _converted(payloads: Sequence[Payload], schema: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """Python values as a table, and why some rows do not fit."""
    import pyarrow as pa

    errors = (pa.ArrowException, ValueError, TypeError, OverflowError)
    if not payloads:
        return schema.empty_table(), {}
    known = set(schema.names)
    wrong = {
        row: f"the collection has no column {min(set(fields) - known)!r}"
        for row, fields in enumerate(payloads)
        if set(fields) - known
    }
    try:
        if not wrong:
            return _table(payloads, schema), {}
    except errors:
        pass
    for row, fields in enumerate(payloads):
        if row not in wrong:
            try:
                _table([fields], schema)
            except errors as error:
                wrong[row] = (str(error).splitlines() or [type(error).__name__])[0]
    return _table([{} if row in wrong else fields for row, fields in enumerate(payloads)], schema), wrong


def _table(payloads: Sequence[Payload], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [_column([fields.get(field.name) for fields in payloads], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError):
        # A time as `rows` has given it as text, or a type that pyarrow makes from others only.
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
        if pa.types.is_dictionary(kind):
            return _column(values, kind.value_type).dictionary_encode().cast(kind)
        if any(isinstance(value, str) for value in values):
            texts = pa.array([value if value is None else str(value) for value in values], pa.string())
            return (texts.cast(pa.int64()) if pa.types.is_duration(kind) else texts).cast(kind)
        raise
