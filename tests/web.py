"""A web server on the loopback with a folder of files, and paths that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Web(ThreadingHTTPServer):
    """`requests` are the raw paths asked for; `released` ends what hangs."""

    daemon_threads = False  # they end before the server is closed

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.released = threading.Event()
        self.hanging = False
        """Whether every request hangs."""
        self.redirect_to = ""
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        name = unquote(self.path).rsplit("/", 1)[-1]
        if self.server.hanging or name == "hangs":
            self.server.released.wait()
            self.close_connection = True
        elif name.isdecimal():
            self.send_response(int(name))
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name.startswith("moved"):
            self.send_response(302)
            self.send_header("Location", self.server.redirect_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "cut":
            self._headers(length=100)
            self.wfile.write(b"x" * 10)
        elif name == "huge":
            self._headers(length=2**40)
        elif name in ("trickles", "endless"):
            self._headers(length=None)
            while not self.server.released.wait(0.02 if name == "trickles" else 0):
                try:
                    self.wfile.write(b"x" if name == "trickles" else b"x" * 65536)
                except OSError:
                    break
        else:
            super().do_GET()

    def _headers(self, *, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    with Web(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
