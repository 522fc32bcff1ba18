"""A real PostgreSQL server for tests, on a socket in a temporary folder; it lives as long as the block that asked."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest


def binaries() -> Path | None:
    """The folder with `initdb` and `pg_ctl`, of the newest server installed here."""
    folders = []
    if pg_config := shutil.which("pg_config"):
        folders.append(Path(subprocess.run([pg_config, "--bindir"], capture_output=True, text=True).stdout.strip()))
    found = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(found, key=lambda folder: [int(part) for part in folder.parent.name.split(".")], reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


@contextmanager
def server() -> Iterator[str]:
    """Starts a server and gives the SQLAlchemy URL of its database `postgres`. Skips where none is installed."""
    folder = binaries()
    if folder is None:
        pytest.skip("no PostgreSQL server is installed here: apt-get install postgresql")
    account = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL cannot run as root, and there is no account called postgres")
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    try:
        if account is not None:
            os.chown(home, account.pw_uid, account.pw_gid)
        data, log = home / "data", home / "server.log"

        def call(program: str, *arguments: str) -> None:
            done = subprocess.run(
                [folder / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the server keeps what it inherits: a pipe would never end
                stderr=subprocess.DEVNULL,
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                cwd=home,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                timeout=60,
            )
            if done.returncode:
                told = log.read_text() if log.exists() else "no log was written"
                raise RuntimeError(f"{program} {arguments} ended with {done.returncode}: {told}")

        call("initdb", "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off -c max_connections=50"
        call("pg_ctl", "-D", str(data), "-l", str(log), "-o", options, "-w", "-t", "30", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={quote(str(home))}"
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)
