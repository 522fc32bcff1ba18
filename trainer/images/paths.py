"""Paths below an image root: one spelling for one file, and nothing that could lead out of the root."""

from __future__ import annotations

from urllib.parse import unquote

from migrator.trainer.errors import ImageProblem
from migrator.trainer.text import sanitized, without_credentials

_MAX_PATH_BYTES = 4096


def plain_path(path: str, *, merge: bool = True) -> str:
    """One spelling for one file: `./a//b` is `a/b`. Without `merge` two slashes stay two."""
    parts = [part for part in path.split("/") if part != "." and (part or not merge)]
    return "/".join(parts) or "."


def is_safe(path: str) -> bool:
    """Whether a local root accepts a relative path."""
    try:
        require_safe(path, decoded=False)
    except ImageProblem:
        return False
    return True


def require_safe(path: str, *, decoded: bool) -> None:
    """Refuses a path that could name something outside the root. `decoded`: also after URL decoding, however often."""
    require_text(path)
    if path.startswith("/") or "\\" in path or "://" in path or "::" in path:
        raise unsafe(path, "must be a plain path below images.root")
    if ".." in path.split("/"):
        raise unsafe(path, "leads out of images.root")
    if decoded and (plain := unquote(path)) != path:
        require_safe(plain, decoded=True)


def require_text(path: str) -> None:
    """Raises ImageProblem for an empty or overlong path, and for one with control characters."""
    if not path:
        raise unsafe(path, "is empty")
    if len(path.encode("utf-8", "replace")) > _MAX_PATH_BYTES:
        raise unsafe(path, "is too long")
    if any(ord(character) < 32 or 0xD800 <= ord(character) <= 0xDFFF or character == "\x7f" for character in path):
        raise unsafe(path, "holds control characters")


def unsafe(path: str, why: str) -> ImageProblem:
    """The problem with a path that is not read."""
    return ImageProblem(f"image path {sanitized(path)} {why}")


def outside(path: str, root: str) -> ImageProblem:
    """The problem with a path that is not below the root."""
    return ImageProblem(f"image path {sanitized(without_credentials(path))} is not below images.root {root!r}")


def require_size(size: int, path: str, max_bytes: int) -> None:
    """Raises ImageProblem for a file over the limit."""
    if size > max_bytes:
        raise ImageProblem(f"image {sanitized(path)} is larger than {max_bytes:,} bytes")
