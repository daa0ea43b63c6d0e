"""Background tasks that outlive their own failures, and the end of a process whose event loop hangs.

A task that nobody awaits dies without a trace: its exception is kept until the task is collected, and what it watched
is watched no more. A supervised task is logged, counted and started again.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("xgen_proxy.supervision")

RESTART_PAUSE_S = 1.0
HANG_S = 30.0  # as Kubernetes' liveness probe: three failures, ten seconds apart
HANG_CHECK_S = 5.0

restarts: dict[tuple[str, ...], float] = {}  # of this process, by (name of the task,): /metrics shows it


def supervise(name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Starts `run()`, and again whenever it ends, until the returned task is cancelled. `name`: a metric label, too."""
    restarts.setdefault((name,), 0.0)
    return asyncio.create_task(_supervised(name, run), name=name)


async def _supervised(name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    task = asyncio.current_task()
    while True:
        try:
            await run()
            log.error("the background task %s ended; it starts again", name)
        except Exception:
            log.exception("the background task %s failed; it starts again", name)
        except asyncio.CancelledError:
            # Perhaps raised by what `run` awaited, while this task was not asked to end.
            if task is None or task.cancelling():
                raise
            log.exception("the background task %s was cancelled from within; it starts again", name)
        restarts[(name,)] += 1
        await asyncio.sleep(RESTART_PAUSE_S)


async def stop(*tasks: asyncio.Task[None] | None) -> None:
    """Cancels tasks and waits for their end."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def exit_when_hung() -> None:
    """End the process with the traceback of every thread when the event loop has not turned for HANG_S.

    Docker restarts a container that has ended, but not one that hangs. The timer is a thread of the interpreter's that
    needs no GIL, so it also ends a loop that is stuck in one regular expression.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            await asyncio.sleep(HANG_CHECK_S)
    finally:
        faulthandler.cancel_dump_traceback_later()
