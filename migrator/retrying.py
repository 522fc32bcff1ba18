"""One way to try again: exponential with jitter, the store's own advice heard, and a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential_jitter

from adapters.base import StoreUnavailable
from trainer.errors import ImagesUnavailable

T = TypeVar("T")

PASSING_FAULTS = (StoreUnavailable, ImagesUnavailable)

_backoff = wait_exponential_jitter(multiplier=0.2, max=10.0, jitter=0.5)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    advised = getattr(error, "retry_after", None)
    return max(_backoff(state), advised or 0.0)


def patiently(call: Callable[[], T], *, seconds: float) -> T:
    """Calls until it works; gives up when the next try would come after `seconds`.

    What is not a passing fault is raised at once.
    """
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

    return Retrying(
        retry=retry_if_exception_type(PASSING_FAULTS),
        wait=_wait,
        stop=stop_before_delay(seconds),
        reraise=True,
    )(again)
