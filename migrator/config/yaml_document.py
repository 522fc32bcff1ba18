"""The YAML of a file, with the line of each key, and the wording of what is wrong in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from migrator.config.schema import (
    STORES,
    Config,
    Migration,
    Section,
)
from migrator.config.values import (
    Place,
)
from migrator.errors import ConfigError

_MAX_BYTES = 1 << 20


_MAX_DEPTH = 20


_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\})?)")


class Loader(yaml.SafeLoader):
    """SafeLoader without aliases: a few of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; refused where it is an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


class Document:
    """Plain values of a YAML document, with the line of each, and every problem met on the way."""

    def __init__(self, file: Path, environment: Mapping[str, str]) -> None:
        self.file = file
        self.environment = environment
        self.scalars = yaml.constructor.SafeConstructor()
        self.lines: dict[Place, int] = {(): 1}
        self.texts: dict[Place, str] = {}  # as written, where the value came from the environment
        self.problems: dict[Place, tuple[int, str]] = {}

    def report(self, at: Place, problem: str, line: int | None = None) -> None:
        """Notes the first problem of a place; one that is not in the file has the line of what encloses it."""
        line = line or next(self.lines[at[:size]] for size in range(len(at), -1, -1) if at[:size] in self.lines)
        where = f"{spell(at)}: " if at else ""
        self.problems.setdefault(at, (line, f"{self.file}:{line}: {where}{problem}"))

    def value(self, node: yaml.Node, at: Place) -> Any:
        """The plain value of a node: mapping, list, text, number, truth or None."""
        self.lines.setdefault(at, node.start_mark.line + 1)
        if len(at) > _MAX_DEPTH:
            self.report(at[:3], "is nested too deeply")
            return None
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(inner, (*at, index)) for index, inner in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp"):
            return self.expanded(node.value, at)
        if isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "bool", "null"):
            try:
                return self.scalars.construct_object(node)
            except (ValueError, LookupError):
                self.report(at, f"cannot be read as {kind}")
                return None
        self.report(at, "YAML tags are not supported: put a value that begins with ! in quotes")
        return None

    def mapping(self, node: yaml.MappingNode, at: Place) -> dict[str, Any]:
        """The values of a mapping; each key is text and stands once."""
        values: dict[str, Any] = {}
        for key, inner in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                self.report((*at, name), "this key is not text: put it in quotes", line)
            elif key.value in values:
                place = (*at, key.value)
                self.report(place, f"duplicate key; remove it or the one on line {self.lines[place]}", line)
            else:
                self.lines[(*at, key.value)] = line
                values[key.value] = self.value(inner, (*at, key.value))
        return values

    def expanded(self, text: str, at: Place) -> str:
        """`text` with `${NAME}` and `${NAME:-default}` replaced from the environment; `$$` stands for `$`."""

        def replacement(match: re.Match[str]) -> str:
            if match["dollar"]:
                return "$"
            self.texts[at] = text
            name, default = match["name"], match["default"]
            if name is None:
                self.report(at, "${ begins a variable: write ${NAME} or ${NAME:-default}, or $${ for the characters")
            elif default is None and name not in self.environment:
                self.report(at, f"the environment variable {name} is not set: set it, or write ${{{name}:-default}}")
            else:
                return self.environment.get(name) or default or ""
            return ""

        return _VARIABLE.sub(replacement, text)


def printable(text: str) -> str:
    """`text` in one short line without control characters."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 80 else shown[:77] + "..."


def spell(at: Place) -> str:
    """A place in the file as `migrations.name.store.kind` or `canary[0]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in at)
    return "".join(parts).removeprefix(".")


def compose(path: Path) -> yaml.Node:
    """The one document of a file, as YAML nodes with their lines."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder: give the path of the migrations.yaml in it")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: run `migrator init`, or name another with --config")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): correct its permissions") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MiB: this is not a migrations.yaml")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text: save it as UTF-8") from error
    try:
        node = Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        problem = re.sub(r"(handle|anchor) .*", r"\1", problem)  # its name may be a secret that begins with ! or &
        if mark and text[mark.index - 1 : mark.index + 1] == "${":
            problem += '; inside { } and [ ] write "${NAME}" with quotes'
        raise ConfigError(f"{path}:{line + 1}:{column + 1}: is not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: is not YAML: it holds a control character") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply: this is not a migrations.yaml") from None
    if node is None:
        raise ConfigError(f"{path}: is empty: run `migrator init` for an example")
    return node


def _known_keys(at: Place, tag: str | None) -> list[str]:
    """The keys that the section at `at` may hold; `tag` tells which kind of store it is."""
    section: type[Section] = Migration if len(at) >= 2 else Config
    if tag in STORES:
        return list(STORES[tag].model_fields)
    for key in at[2:]:
        if isinstance(key, int):  # a place in a list
            continue
        inner = section.model_fields[key].annotation
        members = (get_args(member)[0] if get_args(member) else member for member in get_args(inner))  # of a union
        section = next(kind for kind in (inner, *members) if isinstance(kind, type) and issubclass(kind, Section))
    return [field.alias or name for name, field in section.model_fields.items()]


def wording(kind: str, message: str, at: Place, tag: str | None) -> str:
    """A pydantic problem in this program's words, without the value."""
    if kind == "extra_forbidden":
        known = _known_keys(at[:-1], tag)
        near = difflib.get_close_matches(str(at[-1]), known, n=1)
        return f'unknown key; did you mean "{near[0]}"?' if near else f"unknown key; known are {', '.join(known)}"
    if kind == "string_pattern_mismatch" and len(at) == 2:
        return "a migration's name has 1 to 63 characters of a-z, 0-9, . _ - and begins with a letter or digit"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys to values"
    if kind == "too_short" and at == ("migrations",):
        return "holds no migration; `migrator init` writes an example"
    if kind == "missing":
        return "missing"
    message = message.removeprefix("Value error, ").split(", unable to parse", 1)[0]
    return re.sub(r"^(Input|String|List|Tuple|Dictionary) should ", "must ", message)
