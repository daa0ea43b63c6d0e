"""Limits how many requests retry at once: a fifth of all requests in flight, and at least three.

When much fails at once, retries on top of the usual load would take down what still runs. A retry over the budget
waits for another one to end; it is not dropped, since no request may be lost.
https://finagle.github.io/blog/2016/02/08/retry-budgets/
"""

from __future__ import annotations

import asyncio
from collections import deque

from xgen_proxy.errors import QueueTimeoutError

SHARE = 0.2
MINIMUM = 3
TIMEOUT_FACTOR = 5  # times the queue timeout: after a failure of ours, "try again later" would lose the request


class RetryBudget:
    """`request_started` and `request_finished` count the requests in flight that the budget is a share of."""

    def __init__(self, queue_timeout_s: float) -> None:
        self.queue_timeout_s = queue_timeout_s
        self.in_flight = 0
        self.retrying = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def timeout_s(self) -> float:
        return self.queue_timeout_s * TIMEOUT_FACTOR

    @property
    def queued(self) -> int:
        """Retries that wait for a place."""
        return len(self._queue)

    def request_started(self) -> None:
        self.in_flight += 1

    def request_finished(self) -> None:
        self.in_flight -= 1

    async def acquire(self) -> None:
        """Waits for a place in the budget, in order. Raises QueueTimeoutError after `timeout_s` seconds."""
        if self._queue or not self._has_capacity:
            await self._wait()
        else:
            self.retrying += 1

    def release(self) -> None:
        self.retrying -= 1
        while self._queue and self._has_capacity:
            turn = self._queue.popleft()
            if not turn.done():
                self.retrying += 1
                turn.set_result(None)

    @property
    def _has_capacity(self) -> bool:
        return self.retrying < max(MINIMUM, SHARE * self.in_flight)

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(self.timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release()
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise QueueTimeoutError(
                    f"a backend failed, and no retry was free within {self.timeout_s:g} s; try again later",
                    retry_after=5,
                ) from None
            raise
