"""The chunks that a run holds: kept by a heartbeat, proved before each write, and given up before they can be lost.

A process may be frozen, or cut off from the ledger, at any moment and for any time, and another one then takes its
chunk over or a rollback begins. So that it writes nothing more afterwards,

- a lease ends by the database's clock, and this process counts its time from before the ledger was asked, by a clock
  that continues while it sleeps: what is left by its own count is never more than what is left in the ledger;
- right before each request that changes the store the ledger must confirm the lease by its epoch, and the time left
  must exceed what the request may take.

As in "How to do distributed locking" (M. Kleppmann, 2016): a lease without a fencing token guards nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from migrator.errors import TemporarilyUnavailable
from migrator.ledger import Chunk, LeaseLost, Ledger

log = logging.getLogger(__name__)

MAX_INTERVAL = 10.0
"""Seconds between two heartbeats at most, so that a run notices a rollback early."""
RETRY_INTERVAL = 1.0
"""Seconds until a heartbeat that did not reach the ledger is tried again."""


def elapsed() -> float:
    """Seconds by a clock that only advances, also while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Leases:
    """The leases of one run. Used as a context: the heartbeat runs inside it, and what is held is returned at its end.

    Methods may be called from any thread.
    """

    def __init__(
        self,
        ledger: Ledger,
        migration_id: int,
        owner: str,
        *,
        seconds: float,
        clock: Callable[[], float] = elapsed,
    ) -> None:
        self._ledger, self._migration_id, self._owner, self._seconds = ledger, migration_id, owner, seconds
        self._clock = clock
        self._until: dict[int, float] = {}  # chunk id -> when its lease ends, by our own clock
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._ledger.return_leases(self._migration_id, self._owner)

    def acquire(self, leave: set[int]) -> Chunk | None:
        """The next free chunk, or None. Raises what `Ledger.lease_chunk` does."""
        began = self._clock()
        chunk = self._ledger.lease_chunk(self._migration_id, self._owner, seconds=self._seconds, leave=leave)
        if chunk is not None:
            with self._guard:
                self._until[chunk.id] = began + self._seconds
        return chunk

    def drop(self, chunk: Chunk) -> None:
        """Forgets a chunk that is finished or given back."""
        with self._guard:
            self._until.pop(chunk.id, None)

    def check(self, chunk: Chunk, request_seconds: float) -> None:
        """Returns if a request that may take `request_seconds` may be sent now; else raises `LeaseLost`.

        Raises `TemporarilyUnavailable` where the ledger cannot be asked: what cannot be proved is not written.
        """
        self._ledger.check_lease(chunk)
        with self._guard:  # after the ledger's answer, which may have been slow
            left = self._until.get(chunk.id, 0.0) - self._clock()
        if left <= request_seconds:
            raise LeaseLost(
                f"chunk {chunk.pass_number}/{chunk.ordinal}: its lease ends in {max(left, 0):.0f} s, and a request may "
                f"take {request_seconds:g} s: this process was stopped or cut off from the ledger for a while; run the "
                "command again"
            )

    # -- heartbeat --------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        interval = min(self._seconds / 3, MAX_INTERVAL)
        wait = interval
        while not self._stop.wait(wait):
            wait = interval if self._extend() else RETRY_INTERVAL

    def _extend(self) -> bool:
        with self._guard:
            held = set(self._until)
        if not held:
            return True
        began = self._clock()
        try:
            still = self._ledger.extend_leases(self._migration_id, self._owner, seconds=self._seconds)
        except TemporarilyUnavailable as error:
            log.warning("%s; the leases of this run end unless the ledger answers soon", error)
            return False
        with self._guard:
            for chunk_id in held & self._until.keys():
                # One that the ledger no longer knows as held here is not to be written.
                self._until[chunk_id] = began + self._seconds if chunk_id in still else 0.0
        return True
