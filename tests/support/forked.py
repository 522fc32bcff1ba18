"""Processes of a test's own functions, forked from one that has all loaded."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def forked() -> ForkServerContext:
    """Starts processes from one that has torch already; importing it again each time would take most of a test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.loaded"])
    return context
