"""Images in a folder of this machine."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote

from migrator.trainer.errors import ImageProblem, ImagesUnavailable
from migrator.trainer.images.faults import PATH_ERRNOS
from migrator.trainer.images.paths import outside, plain_path, require_safe, require_size, require_text, unsafe
from migrator.trainer.text import sanitized

_FILE_URL = re.compile(r"(?:file|local):(?://([^/]*))?(/.*)", re.IGNORECASE | re.DOTALL)


class LocalFolder:
    """Regular files below a folder of this machine, symbolic links included as long as they stay below it."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute()) if root else root
        os.close(self._open_root())
        self._real = os.path.realpath(root)

    def below(self, path: str) -> str:
        """As `ImageRoot.below`. An absolute path or file:// URL may spell the root as it is given or as it resolves."""
        require_text(path)
        place = path
        if url := _FILE_URL.fullmatch(path):
            if (url[1] or "").lower() not in ("", "localhost"):
                raise self._outside(path)
            place = unquote(url[2])
        if place.startswith("/"):
            if ".." in place.split("/"):
                raise unsafe(path, "leads out of images.root")
            place = "/" + plain_path(place)
            spelled = {os.path.normpath(self.root), self._real}
            inside = [place.removeprefix(top) for top in spelled if f"{place}/".startswith(f"{top.rstrip('/')}/")]
            if not inside:
                raise self._outside(path)
            place = min(inside, key=len).lstrip("/")
        require_safe(place, decoded=False)
        return plain_path(place)

    def read(self, path: str, max_bytes: int) -> bytes:
        """As `ImageRoot.read`."""
        folder = self._open_root()
        try:
            resolved = os.path.realpath(Path(self._real, path), strict=True)
            inside = Path(os.path.relpath(resolved, self._real))
            if inside.parts[:1] == (os.pardir,):
                raise ImageProblem(f"image {sanitized(path)} leads out of {self.root!r} through a symbolic link")
            descriptor = _open_beneath(folder, inside)
        except OSError as error:
            if error.errno in PATH_ERRNOS:
                raise ImageProblem(f"image {sanitized(path)} cannot be read: {error.strerror}") from error
            raise self._unavailable(error) from error
        finally:
            os.close(folder)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageProblem(f"image {sanitized(path)} is not a regular file")
            require_size(status.st_size, path, max_bytes)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)
        except OSError as error:
            raise self._unavailable(error) from error
        finally:
            os.close(descriptor)

    def _open_root(self) -> int:
        try:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise self._unavailable(error) from error

    def _outside(self, path: str) -> ImageProblem:
        return outside(path, self.root)

    def _unavailable(self, error: Exception) -> ImagesUnavailable:
        reason = getattr(error, "strerror", None) or error
        return ImagesUnavailable(f"image folder {self.root!r} cannot be read: {reason}; check images.root and mounts")


def _open_beneath(folder: int, relative: Path) -> int:
    """Opens a path without links, folder by folder, so that a link put in its way after the check is met, not followed.

    O_NONBLOCK keeps a FIFO from blocking the caller until a writer opens it.
    """
    *folders, name = relative.parts or (os.curdir,)
    current = os.dup(folder)
    try:
        for part in folders:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
            os.close(current)
            current = below
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=current)
    finally:
        os.close(current)
