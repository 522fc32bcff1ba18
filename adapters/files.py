"""What adapters of local folders share: names made durable, and the system's errors translated."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from migrator.adapters.base import StoreRejected, StoreUnavailable

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Vanished(StoreUnavailable):
    """A file was removed or replaced while it was being used; looking again may help."""


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns the operating system's errors into the store's."""
    try:
        yield
    except FileNotFoundError as error:
        raise Vanished(f"{error.filename or path} was removed while in use: restore it, then try again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FORBIDDEN:
            raise StoreRejected(
                f"{path}: {reason}: give this user the right to read and write {path.parent}"
            ) from error
        if isinstance(error, (NotADirectoryError, FileExistsError, IsADirectoryError)):
            raise StoreRejected(f"{path}: {reason}: move what is in its place") from error
        raise StoreUnavailable(
            f"{path}: {reason}: nothing was changed; free space or repair the disk, then try again"
        ) from error


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable, or a file's content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_link(link: Path, target: Path) -> None:
    """Points a symbolic link elsewhere, in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    with translated(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)
        sync_folder(link.parent)
