"""Files that a crash leaves whole or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file durably: under its name it appears complete, or not at all. Raises OSError."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()  # on a full disk half a file would keep the room that is missing
        raise
    sync_folder(path.parent)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document as `write_whole` does."""
    write_whole(path, json.dumps(document, indent=1).encode())


def sync_folder(folder: Path) -> None:
    """Makes durable which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
