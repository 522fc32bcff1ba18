"""Processes of a test's own functions, forked from one that has all loaded."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path


def forked() -> ForkServerContext:
    """Starts processes from one that has torch already; importing it again each time would take most of a test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.loaded"])
    return context


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    """Runs a migrator command in a process of its own, as `subprocess.run` would."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = forked().Process(target=_run, args=(args, out, err))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{args} did not end: {err.read_text()}")
        return subprocess.CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def _run(args: tuple[str, ...], out: Path, err: Path) -> None:
    from migrator.cli import run

    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    code = run(list(args))
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
