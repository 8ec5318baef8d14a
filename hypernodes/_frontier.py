"""Which steps may start next: pure state, no I/O."""

from __future__ import annotations

from collections import deque

from hypernodes._program import Program


class Frontier:
    """The steps of a program that are ready, given those that are done.

    >>> from hypernodes import Pipeline, node
    >>> from hypernodes._program import Places, bind
    >>> @node("b")
    ... def b(a): return a
    >>> @node("c")
    ... def c(a): return a
    >>> @node("d")
    ... def d(b, c): return b, c
    >>> frontier = Frontier(bind(Pipeline([b, c, d]).plan, frozenset({"a"}), None, Places()))
    >>> list(frontier.ready)
    [0, 1]
    >>> frontier.ready.clear(); frontier.finish(0); frontier.finish(1); list(frontier.ready)
    [2]
    """

    __slots__ = ("_program", "_waits_for", "ready")

    def __init__(self, program: Program, done: int = 0) -> None:
        """Start with the first ``done`` steps, in topological order, finished."""
        self._program = program
        self._waits_for = list(program.waits_for)
        for position in range(done):
            for blocked in program.unblocks[position]:
                self._waits_for[blocked] -= 1
        self.ready = deque(position for position in range(done, len(program.steps)) if self._waits_for[position] == 0)

    def finish(self, position: int) -> None:
        """Note that a step is done; what waited only for it becomes ready."""
        waits_for = self._waits_for
        for blocked in self._program.unblocks[position]:
            waits_for[blocked] -= 1
            if waits_for[blocked] == 0:
                self.ready.append(blocked)
