"""What a value of `migrations.yaml` may be: types, and the checks that give their messages."""

from __future__ import annotations

import difflib
import glob
import os
import re
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)

from migrator.trainer.images.templates import parse

_SQLITE = re.compile(r"(?P<driver>sqlite(?:\+pysqlite)?):///(?P<file>[^?]+)(?P<query>\?.*)?")


_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")


COLOUR_PATTERN = "white|black|#[0-9a-fA-F]{6}"


_SIDE = {"type": "integer", "minimum": 8, "maximum": 4096}


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


METRICS = ("map", "recall", "precision", "ndcg", "mrr")
"""Those of `migrator.evaluation.metrics`, named here so that reading a file does not load numpy."""


FLIPS = "negative_flips"
"""The share of queries whose first answer was right and is wrong now."""


MAX_ANSWERS = 1000
"""The longest ranking that a metric may look at."""


METRIC_PATTERN = rf"(?:{'|'.join(METRICS)})@(?:[1-9][0-9]{{0,2}}|{MAX_ANSWERS})"


Place: TypeAlias = tuple[str | int, ...]
"""Keys and list positions from the top of the file to a value."""


def _folder(info: ValidationInfo) -> Path:
    return info.context["folder"] if info.context else Path()


def _local_path(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("must be the path of a local file or folder")
    if "://" in str(value):
        raise ValueError("must be a local path; a URL cannot be read here")
    try:
        return _folder(info) / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError("begins with the home folder of a user who does not exist") from error


def _local_files(value: Any, info: ValidationInfo) -> list[str]:
    """Names of files and patterns, absolute."""
    names = value if isinstance(value, list) and value else [value]
    found = []
    for name in names:
        path = str(_local_path(name, info))
        folder = str(_folder(info))
        if re.search(r"[*?[]", str(name)) and path == os.path.join(folder, str(Path(name))):  # noqa: PTH118 - a pattern
            path = str(Path(glob.escape(folder), name))  # what the folder is called is no pattern
        found.append(path)
    return found


def as_location(value: str, info: ValidationInfo) -> str:
    """A URL as it is; a local path absolute."""
    return value if "://" in value else str(_local_path(value, info))


def as_ledger(value: str, info: ValidationInfo) -> str:
    """The URL of a SQLite or PostgreSQL ledger, with an absolute path."""
    if re.match(r"postgresql(\+[a-z0-9_]+)?://", value):
        return value
    match = _SQLITE.fullmatch(value)
    if match is None or match["file"].startswith((":memory:", "file:")):
        raise ValueError("must be a database URL: sqlite:///file.db, or postgresql+psycopg://user@host/database")
    file = _local_path(match["file"], info)
    if "?" in str(file):
        raise ValueError("lies in a folder with a ? in its name, which a database URL cannot hold: move the ledger")
    return f"{match['driver']}:///{file}{match['query'] or ''}"


def _template(value: str) -> str:
    try:
        parse(value)
    except ValueError:
        raise ValueError(
            'must hold payload fields in braces, such as "{path}", "{shop}/{id}.jpg" or "{metadata.source}"'
        ) from None
    return value


def _duration(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be a duration: a number and s, m, h or d, such as 7d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def as_factory(value: str) -> str:
    """`package.module:function`."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise ValueError("must be package.module:factory, such as encoders:lite2")
    return value


def _image_size(value: Any) -> int | tuple[int, int]:
    found = value if isinstance(value, list | tuple) else [value, value]
    sides = [int(side) if isinstance(side, str) and side.isdecimal() else side for side in found]  # of a ${VARIABLE}
    if len(sides) != 2 or any(type(side) is not int or not 8 <= side <= 4096 for side in sides):
        raise ValueError("must be a whole number from 8 to 4096, or two of them, [height, width]")
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def as_stored(value: Any) -> Any:
    """The word `stored`, for an encoder whose model is not there."""
    if value != "stored":
        raise ValueError("must be a mapping of keys to values, or the word stored")
    return value


def as_metric(value: str) -> str:
    """A metric with its depth, such as map@100, or the share of negative flips."""
    if not re.fullmatch(METRIC_PATTERN, value) and value != FLIPS:
        near = difflib.get_close_matches(value.partition("@")[0], METRICS, n=1)
        advice = f'did you mean "{near[0]}@10"?' if near else f"known are {', '.join(f'{name}@k' for name in METRICS)}"
        raise ValueError(f"is no metric with k up to {MAX_ANSWERS}; {advice}")
    return value


def as_gate_metric(value: str) -> str:
    """A metric of which a gain can be measured."""
    if value == FLIPS:
        raise ValueError(f"{FLIPS} can be one of gate.thresholds: here a metric such as map@100 is compared")
    return as_metric(value)


def as_canary(value: list[int]) -> list[int]:
    """Shares in percent that rise to 100."""
    if value[-1] != 100 or any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError("must rise from step to step and end with 100, such as [1, 10, 50, 100]")
    return value


Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


LocalPath: TypeAlias = Annotated[Path, BeforeValidator(_local_path)]


LocalFiles: TypeAlias = Annotated[
    list[str],
    BeforeValidator(_local_files),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""Names of local files or patterns such as metadata/*.parquet."""


Location: TypeAlias = Annotated[Text, AfterValidator(as_location)]


Template: TypeAlias = Annotated[Text, AfterValidator(_template)]


Duration: TypeAlias = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(lambda value: f"{int(value.total_seconds())}s"),
    WithJsonSchema({"type": "string", "pattern": f"^{_DURATION.pattern}$"}),
]


Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]


Dim: TypeAlias = Annotated[int, Field(ge=1, le=65_536)]


ImageSize: TypeAlias = Annotated[
    int | tuple[int, int],
    BeforeValidator(_image_size),
    WithJsonSchema({"anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}]}),
]


Positive: TypeAlias = Annotated[float, Field(gt=0)]


NotNegative: TypeAlias = Annotated[float, Field(ge=0)]


Method: TypeAlias = Literal["advbct", "bct", "lce", "hot_refresh", "independent", "procrustes", "ridge", "residual_mlp"]
"""The methods of `migrator.trainer.methods` and `.maps`, named here so that reading a file does not load torch."""


POST_HOC: tuple[Method, ...] = ("procrustes", "ridge", "residual_mlp")
"""Those that map the vectors of a new encoder that is finished."""


def shaped(pattern: str) -> Any:
    """For the JSON Schema; the words of a problem are a validator's."""
    return Field(json_schema_extra={"pattern": f"^(?:{pattern})$"})
