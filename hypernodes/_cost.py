"""Where a sync function of unknown cost should run: what measuring its calls says."""

from __future__ import annotations

import weakref
from typing import Any

CHEAP_S = 50e-6
"""A call under this many seconds costs less than the hop to a thread (70 to 110 microseconds)."""
SLOW_S = 1e-3
"""One call on the loop that takes longer than this sends the function back to a thread at once."""
_PROOFS = 3
_STRIKES = 5
_DOUBTFUL_SHARE = 0.2
_MOST_PROOFS = 64


class Cost:
    """What is known of one function's cost in this process: a measurement, never part of a run's state.

    ``inline`` is read before each call. A function starts in a thread and moves to the loop after three
    cheap calls with no slow one between them (others may be cheap ones that waited for the interpreter). It
    goes back after one slow call, or when doubtful ones take a fifth of the time. Each slow call doubles the
    proof that is asked of it next time.
    """

    __slots__ = ("__weakref__", "_cheap", "_doubted_since", "_doubtful", "_doubtful_s", "_proofs", "inline")

    def __init__(self, *, inline: bool = False) -> None:
        self.inline = inline
        self._cheap = 0
        self._doubtful = 0
        self._doubtful_s = 0.0
        self._doubted_since = 0.0
        self._proofs = _PROOFS

    def measured(self, seconds: float) -> None:
        """Note a call that ran in a thread."""
        if seconds > SLOW_S:
            self._cheap = 0
        elif seconds <= CHEAP_S:
            self._cheap += 1
        if self._cheap >= self._proofs:
            self._cheap = self._doubtful = 0
            self.inline = True

    def doubted(self, seconds: float, now: float) -> None:
        """Note a call on the loop that was not cheap, and when it ended, in seconds of any clock."""
        if seconds > SLOW_S:
            self._proofs = min(self._proofs * 2, _MOST_PROOFS)
            self.inline = False
            return
        if self._doubtful == 0:
            self._doubtful_s = 0.0
            self._doubted_since = now - seconds
        self._doubtful += 1
        self._doubtful_s += seconds
        if self._doubtful >= _STRIKES:
            self.inline = self._doubtful_s < _DOUBTFUL_SHARE * (now - self._doubted_since)
            self._doubtful = 0


class Fixed(Cost):
    """A place that was chosen, whatever calls cost."""

    __slots__ = ()

    def measured(self, seconds: float) -> None:
        """Ignore it."""

    def doubted(self, seconds: float, now: float) -> None:
        """Ignore it."""


ON_LOOP = Fixed(inline=True)
ELSEWHERE = Fixed(inline=False)
_costs: weakref.WeakKeyDictionary[Any, Cost] = weakref.WeakKeyDictionary()


def cost_of(node: Any) -> Cost:
    """Return the one measurement of a node's function in this process."""
    cost = _costs.get(node)
    if cost is None:
        cost = _costs.setdefault(node, Cost())
    return cost
