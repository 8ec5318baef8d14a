"""Where a sync function of unknown cost should run: what measuring its calls says."""

from __future__ import annotations

import weakref
from typing import Any

CHEAP_S = 100e-6
"""A call under this many seconds costs no more than the hop to a thread (70 to 110 microseconds)."""
SLOW_S = 1e-3
"""One call on the loop that takes longer than this sends the function back to a thread at once."""
_PROOFS = 3
_STRIKES = 5
_DOUBTFUL_SHARE = 0.2
_MOST_PROOFS = 64
_COMPUTES_SHARE = 0.5
"""The share of its time that a function has the CPU in a call which shows that it computes."""
_WAITS_SHARE = 0.1
_WAITS_S = 0.02
"""A call that takes longer than this, nearly all of it without the CPU, shows that the function waits."""
_FEW_LANES = 2
PER_CPU = 0
_SHORT_S = 200e-6
_MOST_PATIENCE = 12


class Cost:
    """What is known of one function's cost in this process: a measurement, never part of a run's state.

    ``inline`` is read before each call. A function starts in a thread and moves to the loop after three
    cheap calls with no slow one between them (others may be cheap ones that waited for the interpreter). It
    goes back after one slow call, or when doubtful ones take a fifth of the time. Each slow call doubles the
    proof that is asked of it next time.
    """

    __slots__ = (
        "__weakref__",
        "_cheap",
        "_doubted_since",
        "_doubtful",
        "_doubtful_s",
        "_patience",
        "_proofs",
        "_waited",
        "inline",
        "lanes",
    )

    def __init__(self, *, inline: bool = False) -> None:
        self.inline = inline
        self._cheap = 0
        self._doubtful = 0
        self._doubtful_s = 0.0
        self._doubted_since = 0.0
        self._proofs = _PROOFS
        self.lanes: int | None = None
        """In how many threads at once it should run at most: one that computes gains nothing from more, and is slowed
        down by itself until it can no longer prove that it is cheap. PER_CPU for a thread per CPU; None for a function
        that waits, or is not known."""
        self._waited = 0
        self._patience = 0

    def measured(self, seconds: float, cpu_s: float = 0.0) -> None:
        """Note a call that ran in a thread: what it took by the clock, and of the CPU."""
        self._note_kind(seconds, cpu_s)
        if seconds > SLOW_S:
            self._cheap = 0
        elif seconds <= CHEAP_S:
            self._cheap += 1
        if self._cheap >= self._proofs:
            self._cheap = self._doubtful = 0
            self.inline = True

    def _note_kind(self, seconds: float, cpu_s: float) -> None:
        """Find out whether the function computes or waits."""
        if self._patience < 0:
            self._patience += 1
        elif cpu_s > _COMPUTES_SHARE * seconds:
            self.lanes = _FEW_LANES if cpu_s < _SHORT_S else PER_CPU
        elif self.lanes is not None and seconds > _WAITS_S and cpu_s < _WAITS_SHARE * seconds:
            self._waited += 1
            if self._waited % _STRIKES == 0:
                # It waits after all, at least at times: for more and more calls it is not looked at again.
                self.lanes = None
                self._patience = -(1 << min(self._waited, _MOST_PATIENCE))

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

    def measured(self, seconds: float, cpu_s: float = 0.0) -> None:
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
