"""One way to try again: exponential with jitter, the store's own advice heard, and a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from adapters.base import StoreUnavailable
from trainer.errors import ImagesUnavailable

T = TypeVar("T")

_backoff = wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.5)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    advised = getattr(error, "retry_after", None)
    return max(_backoff(state), advised or 0.0)


def patiently(call: Callable[[], T], *, seconds: float) -> T:
    """Calls until it works or `seconds` have passed. What is not a passing fault is raised at once."""
    return Retrying(
        retry=retry_if_exception_type((StoreUnavailable, ImagesUnavailable)),
        wait=_wait,
        stop=stop_after_delay(seconds),
        reraise=True,
    )(call)
