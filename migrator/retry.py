"""One way to retry: exponential backoff with jitter, at least the delay that the server asks for, and a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential_jitter

from migrator.adapters.base import ForwardingStore, Store, StoreUnavailable
from migrator.trainer.errors import ImagesUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT_ERRORS = (StoreUnavailable, ImagesUnavailable)

NOTICEABLE = 2.0
"""Seconds."""

_backoff = wait_exponential_jitter(multiplier=0.2, max=10.0, jitter=0.5)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    advised = getattr(error, "retry_after", None)
    return max(_backoff(state), advised or 0.0)


def with_retries(call: Callable[[], T], *, seconds: float) -> T:
    """What `call` returns, repeated after transient errors; gives up when the next try would start after `seconds`.

    Any other error is raised at once. Waits of `NOTICEABLE` seconds and more are logged.
    """
    began = time.monotonic()
    try:
        return call()  # nearly always: the machinery below costs more than many a call
    except TRANSIENT_ERRORS as error:
        if seconds <= 0:
            raise
        first = [error]

    def again() -> T:
        if first:  # the call above was the first try; its error counts like any other
            raise first.pop()
        return call()

    def log_wait(state: RetryCallState) -> None:
        if state.next_action is None or state.outcome is None:
            return
        if max(state.next_action.sleep, time.monotonic() - began) >= NOTICEABLE:
            log.warning("%s; trying again in %.0f s", state.outcome.exception(), state.next_action.sleep)

    return Retrying(
        before_sleep=log_wait,
        retry=retry_if_exception_type(TRANSIENT_ERRORS),
        wait=_wait,
        stop=stop_before_delay(max(0.0, seconds - (time.monotonic() - began))),
        reraise=True,
    )(again)


class RetryingStore(ForwardingStore):
    """A store with every call repeated for up to `seconds`; the collections that it opens behave alike."""

    def __init__(self, store: Store, *, seconds: float) -> None:
        super().__init__(store)
        self._seconds = seconds

    def _forward(self, call: Callable[[], T]) -> T:
        return with_retries(call, seconds=self._seconds)

    def open_collection(self, collection_id: str) -> Store:
        """The collection, with every call repeated."""
        return RetryingStore(super().open_collection(collection_id), seconds=self._seconds)

    def create_like(self, collection_id: str, *, dim: int) -> Store:
        """The collection, with every call repeated."""
        return RetryingStore(super().create_like(collection_id, dim=dim), seconds=self._seconds)

    def drop(self) -> None:
        """Tried once: a collection that was deleted cannot be deleted again."""
        self._store.drop()

    def close(self) -> None:
        """Tried once."""
        self._store.close()
