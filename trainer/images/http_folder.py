"""Images below a URL of a web server."""

from __future__ import annotations

import re
import time
import weakref
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, unquote, urlsplit

from migrator.trainer.errors import ImageProblem, ImagesUnavailable, TrainerError
from migrator.trainer.images.faults import SOURCE_STATUSES, TIMEOUT, missing_package
from migrator.trainer.images.paths import outside, plain_path, require_safe, require_size, require_text, unsafe
from migrator.trainer.text import one_line, sanitized, without_credentials

if TYPE_CHECKING:
    import httpx


TIMEOUTS_PER_FILE = 10
"""A whole file may take this many timeouts."""
MAX_REDIRECTS = 5
_PORTS = {"http": 80, "https": 443}


class HttpFolder:
    """Files below a URL of a web server. A path is a file's name: it is quoted for the request, whatever it holds.

    Redirects are followed below the root only. One connection pool serves all threads.
    """

    def __init__(self, root: str, *, timeout: float = TIMEOUT) -> None:
        try:
            import httpx
        except ImportError as error:
            raise missing_package("http", root, error) from error
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
        require_text(path)
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
            raise outside(path, self.root)
        if "?" in path or "#" in path:
            raise unsafe(path, "holds a query or fragment, which is not part of a file's name")
        parts = _url_parts(url.path)
        count = len(self._parts)
        if ".." in parts or parts[:count] != self._parts:
            raise outside(path, self.root)
        if any("/" in part for part in parts):
            raise unsafe(path, "holds an encoded slash (%2F)")
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
        if 400 <= status < 500 and status not in SOURCE_STATUSES:
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
        require_size(int(length) if length.isdecimal() else 0, path, max_bytes)
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            require_size(len(data), path, max_bytes)
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
