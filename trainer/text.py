"""Untrusted and foreign text in messages."""

from __future__ import annotations

import re


def sanitized(value: object) -> str:
    """A value from outside as one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:190]}...{text[-1]}"


def one_line(foreign: object) -> str:
    """A foreign exception or text as one line of bounded length."""
    text = " ".join(str(foreign).split())
    return (text if len(text) <= 300 else f"{text[:300]}...") or type(foreign).__name__


def without_credentials(url: str) -> str:
    """A URL whose user and password are hidden."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)
