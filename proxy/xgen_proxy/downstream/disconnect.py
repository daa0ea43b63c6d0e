"""Cancels the work for a request when its client disconnects."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from xgen_proxy.errors import ClientDisconnectedError

WATCH_AFTER_S = 0.02  # most short responses are complete by then; a watching task would cost them a tenth of their CPU


class cancel_on_disconnect:
    """A context manager that cancels the current task when the client disconnects, and raises ClientDisconnectedError.

        with cancel_on_disconnect(receive):
            await work()

    One task waits on receive(), starting WATCH_AFTER_S after entry. Polling is_disconnected() misses clients in some
    stacks: https://github.com/vllm-project/vllm/issues/10087
    """

    __slots__ = ("_disconnected", "_exited", "_receive", "_start_timer", "_task", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._disconnected = self._exited = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._start_timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start_watching)

    def _start_watching(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._exited and self._task is not None:
            self._disconnected = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exited = True
        self._start_timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        task, self._task, self._watcher = self._task, None, None  # break the cycle: each task refers to the other
        if self._disconnected and task is not None:
            task.uncancel()
            raise ClientDisconnectedError from None
