"""Images below an fsspec URL, such as s3://bucket/prefix."""

from __future__ import annotations

from typing import Any

from migrator.trainer.errors import ImageProblem, ImagesUnavailable, TrainerError
from migrator.trainer.images.faults import PATH_ERRNOS, SOURCE_STATUSES, TIMEOUT, missing_package
from migrator.trainer.images.paths import outside, plain_path, require_safe, require_size, require_text, unsafe
from migrator.trainer.text import one_line, sanitized, without_credentials


class RemoteFolder:
    """Objects below an fsspec URL."""

    def __init__(self, root: str, *, timeout: float = TIMEOUT) -> None:
        import fsspec.core
        from fsspec.implementations.local import LocalFileSystem

        self.root = without_credentials(root)
        self._seen = False
        scheme = root.rsplit("::", 1)[-1].partition("://")[0]
        try:
            self._files, self._prefix = fsspec.core.url_to_fs(root, **_options(scheme, timeout))
        except ImportError as error:
            raise missing_package(scheme, root, error) from error
        except Exception as error:
            if isinstance(error, ValueError) and "protocol" in str(error).lower():
                raise TrainerError(f"image root {self.root!r} is of no known kind: {one_line(error)}") from error
            raise self._unavailable(error) from error
        if isinstance(self._files, LocalFileSystem) or isinstance(getattr(self._files, "fs", None), LocalFileSystem):
            # fsspec would follow links out of the root
            raise TrainerError(f"image root {self.root!r} is a folder of this machine: write it as a plain path")
        if scheme in ("s3", "s3a"):
            self._files.retries = 1  # of its own: callers of `read` retry, and report it
        named = self._files.protocol
        self._schemes = () if "::" in root else (named,) if isinstance(named, str) else tuple(named)

    def below(self, path: str) -> str:
        """As `ImageRoot.below`. A URL of the same kind, bucket and prefix is cut; object names are taken as spelled."""
        require_text(path)
        place = path
        scheme, mark, rest = path.partition("://")
        if mark and "::" not in path and scheme.lower() in self._schemes:
            if ".." in rest.split("/"):
                raise unsafe(path, "leads out of images.root")
            whole = str(self._files._strip_protocol(f"{scheme.lower()}://{rest}"))
            prefix = self._prefix.rstrip("/")
            if not whole.startswith(f"{prefix}/"):
                raise outside(path, self.root)
            place = whole.removeprefix(prefix).lstrip("/")
        elif mark:
            raise outside(path, self.root)
        require_safe(place, decoded=True)
        return plain_path(place, merge=False)

    def read(self, path: str, max_bytes: int) -> bytes:
        """As `ImageRoot.read`."""
        try:
            with self._files.open(f"{self._prefix.rstrip('/')}/{path}", "rb") as file:
                require_size(getattr(file, "size", None) or 0, path, max_bytes)
                data: bytes = file.read(max_bytes + 1)
        except ImageProblem:
            raise
        except Exception as error:
            if not _blames_path(error):
                raise self._unavailable(error) from error
            self._require_root(again=isinstance(error, PermissionError))
            raise ImageProblem(f"image {sanitized(path)} cannot be read: {one_line(error)}") from error
        self._seen = True
        require_size(len(data), path, max_bytes)
        return data

    def _require_root(self, *, again: bool) -> None:
        """Tells a missing image from a missing bucket or from refused credentials, before the image gets the blame.

        Checked once, and `again` where access was refused, since credentials expire.
        """
        if self._seen and not again:
            return
        try:
            self._seen = self._files.exists(self._prefix)
        except Exception as error:
            raise self._unavailable(error) from error
        if not self._seen:
            raise ImagesUnavailable(
                f"image root {self.root!r} does not exist or may not be listed: check images.root and its credentials"
            )

    def _unavailable(self, error: Exception) -> ImagesUnavailable:
        return ImagesUnavailable(f"image root {self.root!r} cannot be reached: {one_line(error)}")


def _options(scheme: str, timeout: float) -> dict[str, Any]:
    """What the file system of a scheme is opened with: deadlines, where it has any."""
    if scheme not in ("s3", "s3a"):
        return {}
    attempts = {"total_max_attempts": 1}
    return {scheme: {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": attempts}}}


def _blames_path(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in SOURCE_STATUSES
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return True
    return isinstance(error, OSError) and error.errno in PATH_ERRNOS
