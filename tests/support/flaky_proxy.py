"""A network that can be cut, or slow: a TCP proxy on loopback, before a TCP port or a socket in the file system."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FlakyProxy:
    """Forwards connections to `target`, a path or (host, port), until it is `cut`."""

    def __init__(self, target: str | tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._guard = threading.Lock()
        self._open: list[socket.socket] = []
        self._marked: bytes | None = None
        self._delivered = threading.Event()
        self.held = threading.Event()
        """Set once the marked request is held back."""
        self.answered = threading.Event()
        """Set once it was delivered and answered."""
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self) -> None:
        """From now on nothing passes in either direction; connections stay open and silent."""
        self._whole.clear()

    def hold(self, mark: bytes) -> None:
        """Holds back the next request with `mark` in its first line; others pass."""
        for event in (self.held, self._delivered, self.answered):
            event.clear()
        self._marked = mark

    def deliver(self) -> None:
        """What was held back passes after all."""
        self._delivered.set()

    def _hold_back(self, data: bytes) -> bool:
        with self._guard:
            marked = self._marked is not None and self._marked in data.partition(b"\r\n")[0]
            if marked:
                self._marked = None
        if marked:
            self.held.set()
            self._delivered.wait()
        return marked

    def heal(self) -> None:
        """Connections of before are reset, so that nothing of theirs arrives late; new ones pass."""
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()
        self.deliver()
        self._whole.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal()
        for thread in self._threads:
            thread.join(timeout=30)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        family = socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET
        with client, socket.socket(family) as server:
            with self._guard:
                self._open += [client, server]
            self._whole.wait()
            try:
                server.connect(self._target)
                self._forward(client, server)
            except OSError:
                return

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        was_held = False
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if was_held and source is server:
                        self.answered.set()
                    was_held = self._hold_back(data) or was_held
                    self._whole.wait()
                    other[source].sendall(data)  # fails where it was reset meanwhile


@contextmanager
def flaky_proxy(target: str | tuple[str, int]) -> Iterator[FlakyProxy]:
    proxy = FlakyProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
