"""Tables of the configuration's keys, from the types that check them."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from migrator.config import json_schema
from migrator.trainer.training.settings import FitSettings


@cache
def definitions() -> dict[str, Any]:
    """The sections of `migrations.yaml` by the name of their type."""
    whole = json_schema()
    return {"Config": whole, **whole["$defs"]}


def table(section: str) -> str:
    """Markdown: a row for each key of a section, with type, default and description."""
    found = definitions()[section]
    required = found.get("required", ())
    rows = ["| key | type | default | description |", "|---|---|---|---|"]
    for key, value in found["properties"].items():
        default = "required" if key in required else _default(section, key, value)
        cells = (f"`{key}`", _kind(value), default, _description(value))
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows)


def _description(value: dict[str, Any]) -> str:
    """Its own, or, where it says no more than that, that of the section which it holds."""
    own = value.get("description") or definitions()[value["$ref"].rpartition("/")[2]]["description"]
    return str(own)


def _default(section: str, key: str, value: dict[str, Any]) -> str:
    default = value.get("default")
    if isinstance(default, dict):
        return "see below"
    if default is None and section == "Train" and key != "items":
        default = getattr(FitSettings(), key)  # what is not set takes the trainer's own value
    if default is None:
        return "none"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _kind(value: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in value:
        return "section"
    choices = [each for each in value.get("anyOf", value.get("oneOf", [])) if each.get("type") != "null"]
    if choices:
        kinds = list(dict.fromkeys(map(_kind, choices)))
        return " or ".join(kinds)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    kind = value["type"]
    if kind == "array":
        return _list(value)
    if kind in ("integer", "number"):
        return _number(value)
    names = {"boolean": "`true`, `false`", "object": "mapping of names to sections"}
    if kind == "string" and value.get("format") == "path":
        return "local path"
    colours = re.search(r"white\|black", value.get("pattern", ""))
    if colours:
        return '`white`, `black`, `"#rrggbb"`' + (", `drop`" if "drop" in value["pattern"] else "")
    return names.get(kind, "text")


def _list(value: dict[str, Any]) -> str:
    if "prefixItems" in value:
        return f"{len(value['prefixItems'])} numbers"
    item = "section" if "$ref" in value["items"] else _kind(value["items"])
    size = f"{value['minItems']} " if value.get("minItems") == value.get("maxItems") and "minItems" in value else ""
    return f"list of {size}{item}"


def _number(value: dict[str, Any]) -> str:
    kind = str(value["type"])
    least, most = value.get("minimum"), value.get("maximum")
    above, below = value.get("exclusiveMinimum"), value.get("exclusiveMaximum")
    low = f"{_plain(least)}" if least is not None else f"above {_plain(above)}" if above is not None else ""
    high = f"{_plain(most)}" if most is not None else f"below {_plain(below)}" if below is not None else ""
    if low and high:
        return f"{kind}, {low} to {high}"
    return f"{kind}, {low}{'' if above is not None else ' or more'}" if low else kind


def _plain(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else f"{number}"
