"""Each node sees the context variables of the run's caller, and keeps to itself what it sets.

A function in a thread has a copy of the context anyway. One that is called right here gets one too, by
``copy_context().run`` or by the function below, so that where a node runs makes no difference.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Coroutine, Generator
from contextvars import copy_context
from typing import Any

from hypernodes.errors import AwaitedCancelledError


@types.coroutine
def await_in_copy(coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Await a coroutine, every step of it in one copy of the current context; no task is needed for that.

    Raises:
        AwaitedCancelledError: it let out a cancellation that nobody had asked of this task.
    """
    run = copy_context().run
    try:
        yielded = run(coroutine.send, None)
        while True:
            try:
                sent = yield yielded
            except GeneratorExit:
                run(coroutine.close)
                raise
            except BaseException as error:  # noqa: BLE001 - thrown into the coroutine, whatever it is
                yielded = run(coroutine.throw, error)
            else:
                yielded = run(coroutine.send, sent)
    except StopIteration as done:
        return done.value
    except BaseException as error:
        if _is_not_ours(error):
            raise AwaitedCancelledError(
                "awaited something that had been cancelled, such as a task or future of a client of its own"
            ) from error
        raise


def _is_not_ours(error: BaseException) -> bool:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or not isinstance(error, asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    return task is not None and task.cancelling() == 0
