"""A real Milvus 2.3.5 on loopback, started and killed by handle. Its embedded etcd has fixed ports: one at a time."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import filelock
import pytest

ONE_A_MACHINE = Path(tempfile.gettempdir()) / f"migrator-tests-milvus-{os.getuid()}.lock"
START = 180.0  # seconds
IMPATIENT = {
    "proxy.timeTickInterval": 20,  # a strongly consistent read waits for one: 200 ms
    "common.session.ttl": 3,  # after a SIGKILL the sessions of before must run out: 30 s
    "queryCoord.checkInterval": 100,
    "queryCoord.distPullInterval": 50,
}
AS_IT_COMES = {"proxy.timeTickInterval": 200}
"""For measurements: how long a read waits is part of what the server costs."""
UNSAID = "queryCoord:\n  checkChannelInterval: 100\n  checkSegmentInterval: 100"  # not in the wheel's own file
"""Nothing but how long things take; as the server comes, the tests take five times as long."""


ON_THE_SERVER = pytest.mark.milvus_server
"""For tests that use the session's server."""


class MilvusServer:
    """`start` and `kill` as often as wanted; the data and the address stay."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._settings = settings
        self._server: Any = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.listen_port}"

    def start(self) -> None:
        from milvus import MilvusServer as Wheel

        config = _config(**self._settings)
        server = Wheel(config, wait_for_started=False)
        server.set_base_dir(str(self._folder))
        self._server = server
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ResourceWarning
            )  # it leaves the sockets it tried ports with to the collector
            server.start()
            gc.collect()
        self._wait(server)

    def _wait(self, server: Any) -> None:
        """Until a client gets an answer, and not only the web page that says all is well."""
        deadline = monotonic() + START
        pause = threading.Event()
        while True:
            if server.server_proc.poll() is not None:
                raise RuntimeError(f"Milvus ended by itself: see {self._folder}/logs")
            with contextlib.suppress(urllib.error.URLError, OSError):
                page = f"http://127.0.0.1:{server.webservice_port}/healthz"
                with urllib.request.urlopen(page, timeout=5) as answer:
                    if b"OK" in answer.read() and self._answers():
                        return
            if monotonic() > deadline:
                raise TimeoutError(f"Milvus did not start: see {self._folder}/logs")
            pause.wait(0.2)

    def _answers(self) -> bool:
        from pymilvus import MilvusClient, MilvusException

        try:
            guarded = self._settings.get("authorization_enabled")
            client = MilvusClient(self.uri, timeout=5, token="root:Milvus" if guarded else "")
            try:
                client.list_collections(timeout=5)
            finally:
                client.close()
        except MilvusException:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, to the process that this object started."""
        self._server.server_proc.kill()
        self._server.server_proc.wait(timeout=30)
        self._server.stop()  # closes its logs

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def _config(**settings: object) -> Any:
    from milvus import MilvusServerConfig

    class Config(MilvusServerConfig):  # type: ignore[misc]
        template_text: str

        def load_template(self) -> None:
            super().load_template()
            self.template_text = re.sub("^queryCoord:$", UNSAID, self.template_text, flags=re.MULTILINE)

        def try_bind_port(self, port: int) -> socket.socket | None:
            """Also where the kernel still remembers the connections of a killed server, for a minute."""
            with contextlib.suppress(OSError):
                return socket.create_server(("127.0.0.1", port), reuse_port=False)  # with SO_REUSEADDR
            return None

    config = Config()
    for name, value in {**IMPATIENT, **settings}.items():
        config.set(name, value)
    return config


@contextlib.contextmanager
def milvus_server(folder: Path, **settings: object) -> Iterator[MilvusServer]:
    """A running server. Waits for one of another test process to go."""
    lock = filelock.FileLock(ONE_A_MACHINE, timeout=540, is_singleton=True)
    if lock.is_locked:
        raise RuntimeError("this process runs a Milvus server already, and there can be one at a time")
    with lock:
        server = MilvusServer(folder, **settings)
        try:
            server.start()
            yield server
        finally:
            server.stop()
