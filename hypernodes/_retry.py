"""Retry policies: what a user may say, on top of tenacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypernodes.errors import DefinitionError

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState


@dataclass(frozen=True, slots=True, init=False)
class RetryPolicy:
    """When a failing node is tried again, with exponential backoff and jitter.

    Args:
        attempts: how many in all, the first one included.
        on: the exception types (or the single one) that are worth another attempt; any other fails at once.
            Cancellation, ``KeyboardInterrupt`` and ``SystemExit`` are never retried.
        wait_s: seconds before the second attempt; doubled before each one after it.
        max_wait_s: the longest wait, in seconds, before jitter.
        jitter_s: up to this many random seconds are added to each wait, so that items that failed
            together do not come back together.
    """

    attempts: int
    on: tuple[type[Exception], ...]
    wait_s: float
    max_wait_s: float
    jitter_s: float

    def __init__(
        self,
        attempts: int = 3,
        on: type[Exception] | tuple[type[Exception], ...] = (Exception,),
        wait_s: float = 0.1,
        max_wait_s: float = 5.0,
        jitter_s: float = 0.1,
    ) -> None:
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise DefinitionError(f"attempts must be a whole number of at least 1, not {attempts!r}")
        kinds = on if isinstance(on, tuple) else (on,)
        for kind in kinds:
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                raise DefinitionError(f"a retry policy's `on` takes exception types, not {kind!r}")
        seconds = {"wait_s": wait_s, "max_wait_s": max_wait_s, "jitter_s": jitter_s}
        for name, value in seconds.items():
            if not isinstance(value, int | float) or value < 0:
                raise DefinitionError(f"{name} must be seconds of at least 0, not {value!r}")
        for name, each in {"attempts": attempts, "on": kinds, **seconds}.items():
            object.__setattr__(self, name, each)

    @classmethod
    def of(cls, retry: int | RetryPolicy | None, name: str) -> RetryPolicy | None:
        """Return the policy that ``retry=`` of a node stands for; None when there is a single attempt."""
        if retry is None or isinstance(retry, cls):
            return retry
        if isinstance(retry, int) and not isinstance(retry, bool):
            return cls(attempts=retry)
        raise DefinitionError(f"retry of {name!r} is a number of attempts or a RetryPolicy, not {retry!r}")

    def covers(self, error: BaseException) -> bool:
        """Say whether this error is worth another attempt."""
        return isinstance(error, self.on)

    def retrying(self, before_sleep: Callable[[RetryCallState], Any]) -> AsyncRetrying:
        """Return tenacity's iterator of attempts; it sleeps on the running loop and can be cancelled there."""
        import anyio
        import tenacity

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_exponential(multiplier=self.wait_s, max=self.max_wait_s)
            + tenacity.wait_random(0, self.jitter_s),
            retry=tenacity.retry_if_exception_type(self.on),
            sleep=anyio.sleep,
            before_sleep=before_sleep,
            reraise=True,
        )
