"""Where image files lie: a local folder, a web server, or any other fsspec URL. Nothing outside the root is ever read.

Paths arrive from payloads and files of untrusted origin and are treated as hostile. A path is the name of a file below
the root, or an absolute path or URL that begins with the root and is cut to such a name.
"""

from __future__ import annotations

from typing import Protocol

from migrator.trainer.images.faults import TIMEOUT
from migrator.trainer.images.http_folder import HttpFolder
from migrator.trainer.images.local_folder import LocalFolder
from migrator.trainer.images.remote_folder import RemoteFolder


class ImageRoot(Protocol):
    """The place that all paths are below."""

    root: str
    """As messages show it: without credentials."""

    def below(self, path: str) -> str:
        """The name of the file below the root. Raises ImageProblem where it is outside, or no name."""
        ...

    def read(self, path: str, max_bytes: int) -> bytes:
        """The file's bytes. `path` is what `below` gave. Raises ImageProblem, ImagesUnavailable."""
        ...


def open_root(root: str, *, timeout: float = TIMEOUT) -> ImageRoot:
    """Opens an image root. `timeout` is in seconds.

    Raises ImagesUnavailable where it cannot be opened, TrainerError where this can never work.
    """
    if root.startswith(("file://", "local://")):
        root = root.split("://", 1)[1]
    if root.lower().startswith(("http://", "https://")):
        return HttpFolder(root, timeout=timeout)
    return RemoteFolder(root, timeout=timeout) if "://" in root or "::" in root else LocalFolder(root)
