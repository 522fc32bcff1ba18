"""Numbers, times and untrusted text as people read them, in a terminal or on a page."""

from __future__ import annotations

import datetime as dt
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

MAX_NAMES = 10
MAX_CHARACTERS = 1000
"""Upper bound on the length of any printed text."""
NONE = "–"
_JOINERS = "\u200c\u200d"  # without these some scripts and emoji fall apart


def sanitized(text: str, max_length: int = MAX_CHARACTERS) -> str:
    """Untrusted text as one line of bounded length; invisible characters and direction marks are spelled out."""
    cut = text[:max_length].rstrip() + "…" if len(text) > max_length else text
    return "".join(map(_visible, cut))


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if kind in ("Zl", "Zp") or character in "\t\n\r":
        return " "
    if kind in ("Cc", "Cs", "Co", "Cn") or (kind == "Cf" and character not in _JOINERS):
        return f"[U+{ord(character):04X}]"
    return character


_UNBROKEN = "\ue000"  # stands for a space inside a command while lines are broken


def wrapped(text: str, width: int, *, hanging: str = "") -> str:
    """Text in lines of at most `width`, broken between words and not inside `a command`; a longer word stays whole.

    Lines that follow a line are indented like it, and by `hanging`.
    """
    lines = []
    for line in text.split("\n"):
        unbroken = re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", _UNBROKEN), line)
        indent = line[: len(line) - len(line.lstrip())]
        found = textwrap.wrap(
            unbroken, width, subsequent_indent=indent + hanging, break_long_words=False, break_on_hyphens=False
        )
        lines.append("\n".join(found).replace(_UNBROKEN, " "))
    return "\n".join(lines)


def sentence(text: str, *, capital: bool = True) -> str:
    """A text that another part wrote, as a sentence or the end of one."""
    words = text.strip()
    begin = words[:1].upper() if capital else words[:1]
    return begin + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def number(value: object, digits: int = 3) -> str:
    """0.923"""
    return f"{value:.{digits}f}" if is_number(value) else NONE


def signed(value: object, digits: int = 3) -> str:
    """+0.276, −0.012; a difference that rounds to nothing has no sign."""
    if not is_number(value):
        return NONE
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def percent(value: object, digits: int = 1) -> str:
    """0.0125 as 1.2 %, and 1 as 100 %."""
    if not is_number(value):
        return NONE
    text = f"{100 * value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def metric_name(metric: str) -> str:
    """map@100 as people write it: mAP@100."""
    name, at, k = metric.partition("@")
    return {"map": "mAP", "ndcg": "nDCG", "mrr": "MRR"}.get(name, name.replace("_", " ")) + at + k


def count(value: object) -> str:
    """1,497"""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else NONE


def when(value: object) -> str:
    """A time in ISO 8601 as 2026-11-25 21:39, in UTC."""
    if not isinstance(value, str):
        return NONE
    try:
        at = dt.datetime.fromisoformat(value)
    except ValueError:
        return sanitized(value, 40)
    return f"{at.astimezone(dt.UTC) if at.tzinfo else at:%Y-%m-%d %H:%M}"


def duration(seconds: object) -> str:
    """Seconds as 45 s, 12 min, 3.5 h, 2.1 days."""
    if not is_number(seconds):
        return NONE
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def size(size_in_bytes: object) -> str:
    """Bytes as 384 kB."""
    if not is_number(size_in_bytes):
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if size_in_bytes < 1000:
            return f"{size_in_bytes:.3g} {unit}"
        size_in_bytes /= 1000
    return f"{size_in_bytes:.3g} TB"


def disk_needed(plan: Mapping[str, Any]) -> str:
    """What a plan needs on disk at most, and for what: where written vectors are visible at once, no second index."""
    if plan.get("strategy") == "shadow":
        return f"{size(plan.get('index_bytes'))} for the second collection"
    undo = f"{size(plan.get('undo_bytes'))} for the undo log"
    if plan.get("visible") == "at_once":
        return undo
    return f"{undo}, {size(plan.get('index_bytes'))} next to the index"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that can be formatted; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def name_list(names: Iterable[str]) -> str:
    """Some names in a row, shortened."""
    distinct = sorted(dict.fromkeys(names))
    shown = [quoted(name, 40, plain=True) for name in distinct[:MAX_NAMES]]
    return ", ".join(shown + ["..."] * (len(distinct) > MAX_NAMES)) or "none"


def quoted(value: Any, max_length: int = 60, *, plain: bool = False) -> str:
    """An untrusted value as one line of bounded length; `plain`: text without quotes, where it can be printed."""
    try:
        text = value if plain and isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
