"""Templates over an item's payload, such as `{shop}/{id}.jpg` or `{metadata.source}`, and a value's text.

One implementation for every template of the configuration, and one rule by which a value becomes text, whether it comes
from a store or from a file. Values are looked up in mappings and nowhere else: no attribute is ever read.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import product
from numbers import Integral, Real
from typing import Any
from uuid import UUID

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
# A step is a key of a mapping: anything but what a format string gives a meaning to. A number alone would be a place
# in a list, and spaces at its ends are a slip.
_STEP = r"(?!\d+(?:\.|$))[^\s.!:\[\]](?:[^.!:\[\]\r\n]*[^\s.!:\[\]])?"
_FIELD = re.compile(rf"{_STEP}(?:\.{_STEP})*")
_MISSING = object()
_EXACT = 2**63
MAX_FIELDS = 10
"""Fields that a message names."""


class NotText(ValueError):
    """A value that has no text: a list, a mapping, or bytes that are not UTF-8. The message continues `it is`."""


@dataclass(frozen=True)
class Template:
    """Literal text and the payload fields between it. Made by `parse`."""

    source: str
    pieces: tuple[tuple[str, str | None], ...]
    """Literal text, and the field that follows it; None at the end."""

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields in the order in which they are named."""
        return tuple(field for _, field in self.pieces if field is not None)

    def fill(self, values: Mapping[str, Any]) -> str | None:
        """The template with the values' text put in; None where a field has no value.

        Raises NotText, naming the field, where a value is no text.
        """
        texts = [_named_text(field, lookup(values, field)) for field in self.fields]
        return None if None in texts else self._joined(texts)  # type: ignore[arg-type]

    def fill_each(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """As `fill`, once for each value of a field that holds a list; distinct, in order, without spaces at the ends.

        Empty where a field has no value. Raises NotText for a mapping, or a list in a list.
        """
        lists = []
        for field in self.fields:
            value = lookup(values, field)
            members = value if is_list(value) else [value]
            lists.append([text for text in (_named_text(field, member) for member in members) if text is not None])
        joined = dict.fromkeys(self._joined(texts).strip() for texts in product(*lists))
        return tuple(text for text in joined if text)

    def _joined(self, texts: Iterable[str]) -> str:
        remaining = iter(texts)
        return "".join(literal + ("" if field is None else next(remaining)) for literal, field in self.pieces)


@lru_cache(maxsize=256)
def parse(source: str) -> Template:
    """Reads a template. `{a.b}` is the field `a.b`, or else the field `b` of the mapping `a`; `{{` stands for `{`.

    Raises ValueError where it is malformed, names no field, or holds more than names of fields (indexes, conversions,
    format specifications).
    """
    pieces: list[tuple[str, str | None]] = []
    literal = ""
    for piece in _PIECE.finditer(source):
        text, field = piece[0], piece[1]
        if text in ("{", "}"):
            raise ValueError(f"it has a single {text}: write {{field}}, and {text * 2} for the character")
        if field is None:
            literal += text[0] if text in ("{{", "}}") else text
        elif not _FIELD.fullmatch(field):
            raise ValueError(
                f"{{{field}}} names no field: write a payload field such as {{path}}, or {{metadata.path}} for a "
                "field of a mapping"
            )
        else:
            pieces.append((literal, field))
            literal = ""
    if not pieces:
        raise ValueError("it names no field, so it would be the same for all items: add {path} or {id}")
    return Template(source, (*pieces, (literal, None)))


def lookup(values: Mapping[str, Any], field: str) -> Any:
    """The value of `field`; None where there is none. A key that is spelled with its dots goes before nested ones."""
    found = _lookup(values, field)
    return None if found is _MISSING else found


def _lookup(values: Mapping[str, Any], field: str) -> Any:
    if field in values:
        return values[field]
    at = field.rfind(".")
    while at > 0:
        inner = values.get(field[:at])
        if isinstance(inner, Mapping):
            found = _lookup(inner, field[at + 1 :])
            if found is not _MISSING:
                return found
        at = field.rfind(".", 0, at)
    return _MISSING


def fields_of(values: Mapping[str, Any], *, depth: int = 3) -> list[str]:
    """The fields that a template can name, those of nested mappings with dots: what a message offers."""
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value and depth > 1:
            found += [f"{key}.{inner}" for inner in fields_of(value, depth=depth - 1)]
        else:
            found.append(str(key))
    return found


def field_advice(template: str, fields: Iterable[str]) -> str:
    """For a message: which fields the payloads have, and the one that a template may mean."""
    known = list(dict.fromkeys(fields))
    absent = [name for name in parse(template).fields if name not in known and name != "id"]
    near = [close[0] for name in absent if (close := difflib.get_close_matches(name, known, n=1))]
    shown = [name if name.isprintable() else repr(name) for name in sorted(known)[:MAX_FIELDS]]
    has = f"payloads have {', '.join(shown) or 'no fields'}{', ...' if len(known) > MAX_FIELDS else ''}"
    return f'{has}; did you mean "{{{near[0]}}}"?' if near else has


def is_list(value: Any) -> bool:
    """Whether a value is a list, tuple, set or array: several values in one."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | memoryview | Mapping)


def text_of(value: Any) -> str | None:
    """The text of a value; None where it is missing (None, no finite number, or blank).

    What is the same value has the same text: 3, 3.0 and Decimal("3.00") give `3`. Dates are written as ISO 8601 with a
    space before the time, truth values as `True` and `False`, as pandas writes both into a CSV file. Bytes are read as
    UTF-8. Raises NotText for lists, mappings, other bytes, and what is none of these.
    """
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(bytes(value))
    if isinstance(value, Mapping):
        names = [str(name) for name in value][:MAX_FIELDS]
        raise NotText(f"a structure with the fields {', '.join(names) or 'none'}")
    if is_list(value):
        raise NotText("a list of several values")
    if value != value or value in (math.inf, -math.inf):  # noqa: PLR0124 - NaN and NaT differ from themselves
        return None
    if isinstance(value, bool | date | time | timedelta | UUID):  # a datetime is a date
        return str(value)
    if isinstance(value, Integral | Real | Decimal):
        return _number(value)
    item = getattr(value, "item", None)  # a numpy scalar that is no number: bool, datetime64, str
    if item is not None and type(value).__module__ == "numpy":
        return text_of(item())
    raise NotText(f"of the type {type(value).__name__}")


def _number(value: Any) -> str:
    try:
        if isinstance(value, Integral):
            return str(int(value))
        if isinstance(value, Decimal):
            plain = format(value.normalize(), "f")
            return "0" if plain == "-0" else plain
        if abs(value) < _EXACT and value == int(value):
            return str(int(value))
        return str(value)
    except ValueError as error:  # Python does not write out integers of thousands of digits
        raise NotText("a number of thousands of digits") from error


def _decoded(data: bytes) -> str | None:
    try:
        return text_of(data.decode())
    except UnicodeDecodeError as error:
        raise NotText(f"{len(data):,} bytes that are not text") from error


def _named_text(field: str, value: Any) -> str | None:
    try:
        return text_of(value)
    except NotText as error:
        advice = ""
        if isinstance(value, Mapping) and value:
            advice = f": name one of them, such as {{{field}.{next(iter(value))}}}"
        raise NotText(f"field {field!r} is {error}{advice}") from None
