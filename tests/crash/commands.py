"""Starts migrator commands as processes that can be killed, without loading torch anew for each.

Run as a program this is a small server: it loads the libraries once and forks a child for each command line it reads.
`Commands` is its client.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any


def faketime() -> Path | None:
    """The library that shifts a process's clock, where Debian's package libfaketime is installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Commands:
    """One command at a time: `start`, then `wait` or `kill`.

    Their wall clock is `ahead` seconds ahead of the machine's, by libfaketime; what counts elapsed time is not touched.
    """

    def __init__(self, *, ahead: int = 0) -> None:
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if ahead:
            self.environment |= {
                "LD_PRELOAD": str(faketime()), "FAKETIME": f"{ahead:+d}", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=self.environment,
            cwd=Path(__file__).parents[2],
        )
        self._pid: int | None = None
        assert self._answer(120.0) == "ready"

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)
        self._server.stdout.close()

    def _answer(self, timeout: float) -> Any:
        """The server's next line, or None if there is none within `timeout` seconds."""
        assert self._server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                return None
        line = self._server.stdout.readline()
        assert line, "the server of commands has died"
        return json.loads(line)

    def start(self, *words: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._pid = self._answer(30.0)
        assert isinstance(self._pid, int)

    def wait(self, timeout: float) -> int | None:
        """The exit code (negative for a signal), or None if it still runs after `timeout` seconds."""
        code = self._answer(timeout)
        if code is not None:
            self._pid = None
        return None if code is None else int(code)

    def kill(self) -> int:
        """SIGKILLs the command and returns its exit code; it may have been faster."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGKILL)
        code = self.wait(30.0)
        assert code is not None
        return code

    @property
    def running(self) -> bool:
        return self._pid is not None

    def freeze(self) -> None:
        """Stops the command where it is (SIGSTOP)."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it continue (SIGCONT)."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGCONT)

    def run(self, *words: str) -> tuple[int, float]:
        """Runs a command to its end; returns exit code and seconds."""
        began = time.monotonic()
        self.start(*words)
        code = self.wait(120.0)
        assert code is not None, f"{words} did not end"
        return code, time.monotonic() - began


def serve() -> None:
    import tests.support.loaded  # noqa: F401
    from migrator.cli import run

    gc.collect()
    gc.freeze()  # or the first collection in each child copies the pages of all that was loaded
    print(json.dumps("ready"), flush=True)
    child = 0
    for line in sys.stdin:
        words = json.loads(line)
        if child:
            os.waitpid(child, 0)  # only now is its number free for other processes, which a late kill would hit
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os._exit(run(words))
        print(json.dumps(child), flush=True)
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert end is not None
        print(json.dumps(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status), flush=True)


if __name__ == "__main__":
    serve()
