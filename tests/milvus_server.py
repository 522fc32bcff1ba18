"""A real Milvus 2.3.5 on loopback, started and killed by handle. Its embedded etcd has fixed ports: one at a time."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import filelock

ONE_A_MACHINE = Path(tempfile.gettempdir()) / f"migrator-tests-milvus-{os.getuid()}.lock"
START = 180.0  # seconds; after a SIGKILL the old sessions in etcd must run out first


class MilvusServer:
    """`start` and `kill` as often as wanted; the data stay. The address may be another after each start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: object | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.listen_port}"  # type: ignore[union-attr]

    def start(self) -> None:
        from milvus import MilvusServer as Wheel
        from milvus import MilvusServerConfig

        if self._server is not None:
            self._wait_for_port(self._server.listen_port)  # type: ignore[attr-defined]
        server = Wheel(MilvusServerConfig(), wait_for_started=False)
        server.set_base_dir(str(self._folder))
        self._server = server
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ResourceWarning
            )  # it leaves the sockets it tried ports with to the collector
            server.start()
            gc.collect()
        self._wait(server)

    @staticmethod
    def _wait_for_port(port: int) -> None:
        """Until the port of a killed server can be taken again; else the wheel moves to another one."""
        deadline, pause = monotonic() + START, threading.Event()
        while True:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return
            if monotonic() > deadline:
                raise TimeoutError(f"port {port} does not become free")
            pause.wait(0.2)

    def _wait(self, server: object) -> None:
        """Until a client gets an answer, and not only the web page that says all is well."""
        deadline = monotonic() + START
        pause = threading.Event()
        while True:
            if server.server_proc.poll() is not None:  # type: ignore[attr-defined]
                raise RuntimeError(f"Milvus ended by itself: see {self._folder}/logs")
            with contextlib.suppress(urllib.error.URLError, OSError):
                page = f"http://127.0.0.1:{server.webservice_port}/healthz"  # type: ignore[attr-defined]
                with urllib.request.urlopen(page, timeout=5) as answer:
                    if b"OK" in answer.read() and self._answers():
                        return
            if monotonic() > deadline:
                raise TimeoutError(f"Milvus did not start: see {self._folder}/logs")
            pause.wait(0.2)

    def _answers(self) -> bool:
        from pymilvus import MilvusClient, MilvusException

        try:
            client = MilvusClient(self.uri, timeout=5)
            try:
                client.list_collections(timeout=5)
            finally:
                client.close()
        except MilvusException:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, to the process that this object started."""
        self._server.server_proc.kill()  # type: ignore[union-attr]
        self._server.server_proc.wait(timeout=30)  # type: ignore[union-attr]

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()  # type: ignore[attr-defined]
            self._server = None


@contextlib.contextmanager
def milvus_server(folder: Path) -> Iterator[MilvusServer]:
    """A running server. Waits for one of another test process to go."""
    with filelock.FileLock(ONE_A_MACHINE, timeout=540):
        server = MilvusServer(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
