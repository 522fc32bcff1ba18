"""One way to try again: exponential with jitter, the store's own advice heard, and a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential_jitter

from migrator.adapters.base import Store, StoreUnavailable
from migrator.trainer.errors import ImagesUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

PASSING_FAULTS = (StoreUnavailable, ImagesUnavailable)

NOTICEABLE = 2.0
"""Seconds."""

_backoff = wait_exponential_jitter(multiplier=0.2, max=10.0, jitter=0.5)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    advised = getattr(error, "retry_after", None)
    return max(_backoff(state), advised or 0.0)


def patiently(call: Callable[[], T], *, seconds: float) -> T:
    """Calls until it works; gives up when the next try would come after `seconds`, the first call included.

    What is not a passing fault is raised at once. Once the waiting gets noticeable a line tells of it.
    """
    began = time.monotonic()
    try:
        return call()  # nearly always: the machinery below costs more than many a call
    except PASSING_FAULTS as error:
        if seconds <= 0:
            raise
        first = [error]

    def again() -> T:
        if first:  # the call above was the first try: its fault is waited for like any other
            raise first.pop()
        return call()

    def tell(state: RetryCallState) -> None:
        if state.next_action is None or state.outcome is None:
            return
        if max(state.next_action.sleep, time.monotonic() - began) >= NOTICEABLE:
            log.warning("%s; trying again in %.0f s", state.outcome.exception(), state.next_action.sleep)

    return Retrying(
        before_sleep=tell,
        retry=retry_if_exception_type(PASSING_FAULTS),
        wait=_wait,
        stop=stop_before_delay(max(0.0, seconds - (time.monotonic() - began))),
        reraise=True,
    )(again)


def patient(store: Store, *, seconds: float) -> Store:
    """`store`, with every call tried again for so long; so are those of its siblings."""
    return cast(Store, _Patient(store, seconds))


class _Patient:
    def __init__(self, store: Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds

    def __getattr__(self, name: str) -> Any:
        value = patiently(lambda: getattr(self._store, name), seconds=self._seconds)  # capabilities may ask the store
        # Every other call may be repeated; a collection that is gone cannot be dropped again.
        if not callable(value) or name in ("drop", "close"):
            return value

        def call(*words: Any, **options: Any) -> Any:
            found = patiently(lambda: value(*words, **options), seconds=self._seconds)
            return _Patient(found, self._seconds) if name in ("sibling", "create_like") else found

        return call
