"""Where image files lie: a local folder, a web server, or any other fsspec URL. Nothing outside the root is ever read.

Paths arrive from payloads and files of anybody's making and are treated as hostile. A path is the name of a file below
the root, or an absolute path or URL that begins with the root and is cut to such a name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import SplitResult, quote, unquote, urlsplit

from migrator.trainer.errors import ImageProblem, ImagesUnavailable, TrainerError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 30.0
"""Seconds without a byte from a server, unless another number is given."""
TIMEOUTS_PER_FILE = 10
"""A whole file may take this many timeouts."""
MAX_REDIRECTS = 5
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""Scheme -> the extra that brings what reads it."""

# An error with one of these numbers comes from the path; any other from the disk, the network or the process.
_PATH_ERRNOS = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ENXIO,
        errno.EACCES,
        errno.EPERM,
    }
)
# A server may ask for patience or credentials; any other 4xx is its answer about this one path.
_SOURCE_STATUSES = frozenset({401, 407, 408, 425, 429})
_MAX_PATH_BYTES = 4096
_PORTS = {"http": 80, "https": 443}
_FILE_URL = re.compile(r"(?:file|local):(?://([^/]*))?(/.*)", re.IGNORECASE | re.DOTALL)


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


class LocalFolder:
    """Regular files below a folder of this machine, symbolic links included as long as they stay below it."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute()) if root else root
        os.close(self._open_root())
        self._real = os.path.realpath(root)

    def below(self, path: str) -> str:
        """As `ImageRoot.below`. An absolute path or file:// URL may spell the root as it is given or as it resolves."""
        _require_text(path)
        place = path
        if url := _FILE_URL.fullmatch(path):
            if (url[1] or "").lower() not in ("", "localhost"):
                raise self._outside(path)
            place = unquote(url[2])
        if place.startswith("/"):
            if ".." in place.split("/"):
                raise _unsafe(path, "leads out of images.root")
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
            if error.errno in _PATH_ERRNOS:
                raise ImageProblem(f"image {sanitized(path)} cannot be read: {error.strerror}") from error
            raise self._unavailable(error) from error
        finally:
            os.close(folder)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageProblem(f"image {sanitized(path)} is not a regular file")
            _require_size(status.st_size, path, max_bytes)
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
        return _outside(path, self.root)

    def _unavailable(self, error: Exception) -> ImagesUnavailable:
        reason = getattr(error, "strerror", None) or error
        return ImagesUnavailable(f"image folder {self.root!r} cannot be read: {reason}; check images.root and mounts")


def _open_beneath(folder: int, relative: Path) -> int:
    """Opens a path without links, folder by folder, so that a link put in its way after the check is met, not followed.

    O_NONBLOCK keeps a FIFO from hanging the caller until somebody writes to it.
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


class HttpFolder:
    """Files below a URL of a web server. A path is a file's name: it is quoted for the request, whatever it holds.

    Redirects are followed below the root only. One connection pool serves all threads.
    """

    def __init__(self, root: str, *, timeout: float = TIMEOUT) -> None:
        try:
            import httpx
        except ImportError as error:
            raise _missing_package("http", root, error) from error
        self.root = without_credentials(root)
        if "?" in root or "#" in root:
            raise TrainerError(
                f"image root {self.root.partition('?')[0]!r} has a query or fragment: end it with the folder's path"
            )
        try:
            self._origin = _origin(urlsplit(root))
            httpx.URL(root)
        except (ValueError, httpx.InvalidURL) as error:
            raise TrainerError(f"image root {self.root!r} is no valid URL: {one_line(error)}") from error
        self._base = root.rstrip("/")
        self._parts = _url_parts(urlsplit(self._base).path)
        self._timeout = timeout
        self._client = httpx.Client(
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            headers={"User-Agent": "advbct-migrator", "Accept-Encoding": "identity"},
        )
        weakref.finalize(self, self._client.close)

    def below(self, path: str) -> str:
        """As `ImageRoot.below`. A URL, whole or from its host or first slash on, is cut and decoded."""
        _require_text(path)
        place = self._cut(path) if path.startswith("/") or "://" in path else path
        require_safe(place, decoded=True)
        return plain_path(place, merge=False)

    def _cut(self, path: str) -> str:
        try:
            url = urlsplit(path)
            origin = _origin(url, self._origin) if url.netloc or not url.scheme else None
        except ValueError:
            origin = None
        if origin != self._origin or "@" in url.netloc:
            raise _outside(path, self.root)
        if "?" in path or "#" in path:
            raise _unsafe(path, "holds a query or fragment, which is not part of a file's name")
        parts = _url_parts(url.path)
        count = len(self._parts)
        if ".." in parts or parts[:count] != self._parts:
            raise _outside(path, self.root)
        if any("/" in part for part in parts):
            raise _unsafe(path, "holds an encoded slash (%2F)")
        return "/".join(parts[count:]).lstrip("/")

    def read(self, path: str, max_bytes: int) -> bytes:
        """As `ImageRoot.read`."""
        import httpx

        url = f"{self._base}/{quote(path, safe='/')}"
        deadline = time.monotonic() + TIMEOUTS_PER_FILE * self._timeout
        try:
            for _ in range(MAX_REDIRECTS):
                with self._client.stream("GET", url) as response:
                    if response.next_request is None:
                        self._require_ok(response, path)
                        return self._body(response, path, max_bytes, deadline)
                    url = self._redirected(str(response.next_request.url), path)
        except httpx.TimeoutException as error:
            raise self._unavailable(f"no answer within {self._timeout:g} s") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.DecodingError) as error:
            raise ImageProblem(f"image {sanitized(path)} cannot be read: {one_line(error)}") from error
        except httpx.TransportError as error:
            raise self._unavailable(one_line(error)) from error
        raise ImageProblem(f"image {sanitized(path)} is redirected more than {MAX_REDIRECTS} times")

    def _redirected(self, url: str, path: str) -> str:
        try:
            place = self.below(url)
        except ImageProblem as problem:
            target = without_credentials(url).partition("?")[0]
            raise ImageProblem(
                f"image {sanitized(path)} is redirected to {sanitized(target)}, which is not below images.root "
                f"{self.root!r}: set images.root to where the images are"
            ) from problem
        return f"{self._base}/{quote(place, safe='/')}"

    def _require_ok(self, response: httpx.Response, path: str) -> None:
        status = response.status_code
        if status == 200:
            return
        answer = f"{status} {response.reason_phrase}".strip()
        if 400 <= status < 500 and status not in _SOURCE_STATUSES:
            hint = ""
            if status == 404 and unquote(path) != path:
                hint = ": a path is a file's name, and its % is sent as %25; store decoded names, or whole URLs"
            raise ImageProblem(f"image {sanitized(path)} cannot be read: the server answers {answer}{hint}")
        if status < 400:
            raise ImageProblem(
                f"image {sanitized(path)} cannot be read: the server answers {answer} in place of a file"
            )
        delay = response.headers.get("Retry-After", "")
        raise self._unavailable(
            f"the server answers {answer}", retry_after=float(delay) if re.fullmatch(r"\d{1,5}", delay) else None
        )

    def _body(self, response: httpx.Response, path: str, max_bytes: int, deadline: float) -> bytes:
        length = response.headers.get("Content-Length", "")
        _require_size(int(length) if length.isdecimal() else 0, path, max_bytes)
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            _require_size(len(data), path, max_bytes)
            if time.monotonic() > deadline:
                raise self._unavailable(f"a file did not arrive within {TIMEOUTS_PER_FILE * self._timeout:g} s")
        return bytes(data)

    def _unavailable(self, why: str, *, retry_after: float | None = None) -> ImagesUnavailable:
        return ImagesUnavailable(f"image root {self.root!r} cannot be reached: {why}", retry_after=retry_after)


def _origin(url: SplitResult, default: tuple[str, str, int] | None = None) -> tuple[str, str, int]:
    """Scheme, host and port; what a URL leaves open is that of `default`. Raises ValueError."""
    scheme = url.scheme.lower() or (default[0] if default else "")
    if not url.netloc and default:
        return default
    if scheme not in _PORTS or not url.hostname:
        raise ValueError("it has no host")
    return scheme, url.hostname, url.port or _PORTS[scheme]


def _url_parts(path: str) -> list[str]:
    """The steps of a URL's path, decoded."""
    return [unquote(part) for part in path.lstrip("/").split("/") if part != "."] if path.strip("/") else []


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
            raise _missing_package(scheme, root, error) from error
        except Exception as error:
            if isinstance(error, ValueError) and "protocol" in str(error).lower():
                raise TrainerError(f"image root {self.root!r} is of no known kind: {one_line(error)}") from error
            raise self._unavailable(error) from error
        if isinstance(self._files, LocalFileSystem) or isinstance(getattr(self._files, "fs", None), LocalFileSystem):
            # fsspec would follow links out of the root
            raise TrainerError(f"image root {self.root!r} is a folder of this machine: write it as a plain path")
        if scheme in ("s3", "s3a"):
            self._files.retries = 1  # of its own; whoever calls `read` tries again, and says so
        named = self._files.protocol
        self._schemes = () if "::" in root else (named,) if isinstance(named, str) else tuple(named)

    def below(self, path: str) -> str:
        """As `ImageRoot.below`. A URL of the same kind, bucket and prefix is cut; object names are taken as spelled."""
        _require_text(path)
        place = path
        scheme, mark, rest = path.partition("://")
        if mark and "::" not in path and scheme.lower() in self._schemes:
            if ".." in rest.split("/"):
                raise _unsafe(path, "leads out of images.root")
            whole = str(self._files._strip_protocol(f"{scheme.lower()}://{rest}"))
            prefix = self._prefix.rstrip("/")
            if not whole.startswith(f"{prefix}/"):
                raise _outside(path, self.root)
            place = whole.removeprefix(prefix).lstrip("/")
        elif mark:
            raise _outside(path, self.root)
        require_safe(place, decoded=True)
        return plain_path(place, merge=False)

    def read(self, path: str, max_bytes: int) -> bytes:
        """As `ImageRoot.read`."""
        try:
            with self._files.open(f"{self._prefix.rstrip('/')}/{path}", "rb") as file:
                _require_size(getattr(file, "size", None) or 0, path, max_bytes)
                data: bytes = file.read(max_bytes + 1)
        except ImageProblem:
            raise
        except Exception as error:
            if not _blames_path(error):
                raise self._unavailable(error) from error
            self._require_root(again=isinstance(error, PermissionError))
            raise ImageProblem(f"image {sanitized(path)} cannot be read: {one_line(error)}") from error
        self._seen = True
        _require_size(len(data), path, max_bytes)
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


def _missing_package(scheme: str, root: str, error: ImportError) -> TrainerError:
    extra = EXTRAS.get(scheme)
    advice = f"pip install 'advbct-migrator[{extra}]'" if extra else "install the fsspec package of this scheme"
    return TrainerError(f"image root {without_credentials(root)!r} needs a package ({one_line(error)}): {advice}")


def _blames_path(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _SOURCE_STATUSES
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return True
    return isinstance(error, OSError) and error.errno in _PATH_ERRNOS


# --- paths ----------------------------------------------------------------------------------------------------------


def plain_path(path: str, *, merge: bool = True) -> str:
    """One spelling for one file: `./a//b` is `a/b`. Without `merge` two slashes stay two."""
    parts = [part for part in path.split("/") if part != "." and (part or not merge)]
    return "/".join(parts) or "."


def is_safe(path: str) -> bool:
    """Whether a local root would take a relative path for what it says."""
    try:
        require_safe(path, decoded=False)
    except ImageProblem:
        return False
    return True


def require_safe(path: str, *, decoded: bool) -> None:
    """Refuses a path that could name something outside the root. `decoded`: also after URL decoding, however often."""
    _require_text(path)
    if path.startswith("/") or "\\" in path or "://" in path or "::" in path:
        raise _unsafe(path, "must be a plain path below images.root")
    if ".." in path.split("/"):
        raise _unsafe(path, "leads out of images.root")
    if decoded and (plain := unquote(path)) != path:
        require_safe(plain, decoded=True)


def _require_text(path: str) -> None:
    if not path:
        raise _unsafe(path, "is empty")
    if len(path.encode("utf-8", "replace")) > _MAX_PATH_BYTES:
        raise _unsafe(path, "is too long")
    if any(ord(character) < 32 or 0xD800 <= ord(character) <= 0xDFFF or character == "\x7f" for character in path):
        raise _unsafe(path, "holds control characters")


def _unsafe(path: str, why: str) -> ImageProblem:
    return ImageProblem(f"image path {sanitized(path)} {why}")


def _outside(path: str, root: str) -> ImageProblem:
    return ImageProblem(f"image path {sanitized(without_credentials(path))} is not below images.root {root!r}")


def _require_size(size: int, path: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageProblem(f"image {sanitized(path)} is larger than {max_bytes:,} bytes")


# --- text -----------------------------------------------------------------------------------------------------------


def sanitized(value: object) -> str:
    """A value from outside as one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:190]}...{text[-1]}"


def one_line(error: Exception) -> str:
    """A foreign exception as one line of bounded length."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:200]}...") or type(error).__name__


def without_credentials(url: str) -> str:
    """A URL whose user and password are hidden."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)
