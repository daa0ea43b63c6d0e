"""How many requests may be on a second try at once: a fifth of all that are in flight, at least three.

When much fails at once, retries on top of the usual load would take down what still runs. A retry over the budget is
not dropped but waits for another to end, since no request is to be lost.
https://finagle.github.io/blog/2016/02/08/retry-budgets/
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from xgen_proxy.errors import QueueTimeoutError

SHARE = 0.2
AT_LEAST = 3
TIMEOUT_FACTOR = 5  # times the queue's timeout: to be told to come again after a failure of ours is to be lost


class RetryBudget:
    """`async with budget:` around the retries of one request. `in_flight`: requests now; the gateway's own count."""

    def __init__(self, queue_timeout_s: float) -> None:
        self.queue_timeout_s = queue_timeout_s
        self.in_flight = 0
        self.retrying = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def timeout_s(self) -> float:
        return self.queue_timeout_s * TIMEOUT_FACTOR

    @property
    def _room(self) -> bool:
        return self.retrying < max(AT_LEAST, SHARE * self.in_flight)

    async def __aenter__(self) -> None:
        """Raises QueueTimeoutError when it has waited too long."""
        if self._waiting or not self._room:
            await self._wait()
        else:
            self.retrying += 1

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self.timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._give_back()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise QueueTimeoutError(
                    f"a backend failed, and no retry was free within {self.timeout_s:g} s; try again later",
                    retry_after=5,
                ) from None
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        self.retrying -= 1
        while self._waiting and self._room:
            turn = self._waiting.popleft()
            if not turn.done():
                self.retrying += 1
                turn.set_result(None)
