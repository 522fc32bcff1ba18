"""Leaving room for the queries that the same machine answers."""

from __future__ import annotations

import threading
import time

MAX_WORK = 30.0
"""Seconds that count as work at most. What took longer was no batch: the process was stopped, or waited for others."""


class Throttle:
    """Sleeps `nice` times as long as was worked: 0 never sleeps, 1 works half of the time.

    The first call only starts the clock.
    """

    def __init__(self, nice: float, stop: threading.Event) -> None:
        self._nice = nice
        self._stop = stop
        self._since: float | None = None

    def rest(self) -> None:
        """Sleeps for the work done since the last rest; a stop request ends the sleep."""
        if self._nice > 0 and self._since is not None:
            self._stop.wait(self._nice * min(time.monotonic() - self._since, MAX_WORK))
        self._since = time.monotonic()
