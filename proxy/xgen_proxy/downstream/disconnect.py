"""Cancels the work for a request when its client disconnects."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from starlette.types import Receive

from xgen_proxy.errors import ClientDisconnectedError

WATCH_AFTER_S = 0.02  # most short responses are complete by then; a watching task would cost them a tenth of their CPU


class DisconnectMonitor:
    """Watches the clients of all requests that take longer than WATCH_AFTER_S.

    One timer starts the watchers of all requests, in order: a timer for each costs a small request a hundredth of its
    CPU.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[float, cancel_on_disconnect]] = deque()  # when to start it, as loop time
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, receive: Receive) -> cancel_on_disconnect:
        """`receive`: the request's own. Nothing else may call it inside the block."""
        return cancel_on_disconnect(receive, self)

    def start_soon(self, watcher: cancel_on_disconnect) -> None:
        loop = asyncio.get_running_loop()
        self._queue.append((loop.time() + WATCH_AFTER_S, watcher))
        if self._timer is None:
            self._timer = loop.call_later(WATCH_AFTER_S, self._start_due)

    def _start_due(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._queue:
            at, watcher = self._queue[0]
            if not watcher.exited and at > loop.time():
                self._timer = loop.call_at(at, self._start_due)
                return
            self._queue.popleft()
            if not watcher.exited:
                watcher.start()


class cancel_on_disconnect:
    """A context manager that cancels the current task when the client disconnects, and raises ClientDisconnectedError.

        with monitor.watch(receive):
            await work()

    One task waits on receive(), starting WATCH_AFTER_S after entry. Polling is_disconnected() misses clients in some
    stacks: https://github.com/vllm-project/vllm/issues/10087
    """

    __slots__ = ("_disconnected", "_monitor", "_receive", "_task", "_watcher", "exited")

    def __init__(self, receive: Receive, monitor: DisconnectMonitor) -> None:
        self._receive: Receive | None = receive
        self._monitor = monitor
        self._disconnected = self.exited = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._monitor.start_soon(self)

    def start(self) -> None:
        """Called by the monitor if the block has not been left by then."""
        if self._receive is not None:
            self._watcher = asyncio.create_task(self._watch(self._receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self.exited and self._task is not None:
            self._disconnected = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.exited = True
        if self._watcher is not None:
            self._watcher.cancel()
        task, self._task, self._watcher = self._task, None, None  # break the cycle: each task refers to the other
        self._receive = None  # the monitor still holds us for a moment
        if self._disconnected and task is not None:
            task.uncancel()
            raise ClientDisconnectedError from None
