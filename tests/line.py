"""A TCP line to a server that can be cut and can fall silent, as networks do."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Line:
    """Forwards a port of its own to `port`, both on loopback."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._silent = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, args=(self._listener,))]
        self._threads[0].start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:  # closed with the line: a thread may still wait in one
                    self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pump, args=(one, other)))
                    self._threads[-1].start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if not self._silent:
                    other.sendall(data)

    def fall_silent(self) -> None:
        """Connections are accepted and stay open, and nothing comes through."""
        self._silent = True

    def cut(self) -> None:
        """Connections break, and new ones are refused."""
        assert self._listener is not None
        # A thread that waits in accept keeps the port until something comes.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._listener = None
        self._break()

    def _break(self) -> None:
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """All is well again; connections of before are gone."""
        self._silent = False
        self._break()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._threads.append(threading.Thread(target=self._accept, args=(self._listener,)))
            self._threads[-1].start()

    def close(self) -> None:
        if self._listener is not None:
            self.cut()
        for thread in self._threads:
            thread.join()
        for one in self._sockets:
            one.close()


@contextlib.contextmanager
def line_to(port: int) -> Iterator[Line]:
    line = Line(port)
    try:
        yield line
    finally:
        line.close()
