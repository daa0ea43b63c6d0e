"""Who gets a replica's next free slot. No replica is sent more requests than it can hold: llama.cpp queues without
bound, and llama-cpp-python breaks when it gets two requests at once.

A request that finds no free slot is queued in order of arrival shifted by urgency: high counts as 30 s earlier, low as
30 s later. All requests age at the same pace, so none starves. A free slot goes to the first queued request that can
use it. A request leaves the queue when it gets a slot, its client disconnects, its time is up (429), or every replica
it could use is down (then its plan continues with the next tier).

A request that is several (choices times prompts) takes as many slots as soon as one is free: waiting for all of them it
would starve behind small ones. Those after it wait until there is room again.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from xgen_proxy.errors import QueueFullError, QueueTimeoutError, UpstreamConnectError
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.features import Urgency

HEAD_START_S: dict[Urgency, float] = {"high": 30.0, "normal": 0.0, "low": -30.0}


class Usable(Protocol):
    """`usable`: the replica may be sent requests now. It is up, or nothing is and it answers at least. `slots`: those
    that the request takes there."""

    @property
    def replica(self) -> Replica: ...

    @property
    def usable(self) -> bool: ...

    @property
    def slots(self) -> int: ...


T = TypeVar("T", bound=Usable)


@dataclass(order=True, slots=True)
class Waiter(Generic[T]):
    key: tuple[float, int]
    targets: Sequence[T] = field(compare=False)
    future: asyncio.Future[T] = field(compare=False)


class Admission:
    """try_acquire(), or if it finds no free slot enqueue() and wait(); then release().

    `limit`: the longest queue. `timeout_s`: the longest wait in it.
    """

    def __init__(self, limit: int, timeout_s: float) -> None:
        self.limit = limit
        self.timeout_s = timeout_s
        self.queue: list[Waiter[Any]] = []
        self._ticket = itertools.count()

    def try_acquire(self, targets: Sequence[T]) -> T | None:
        """Acquire a slot without waiting. A slot that is free now is one that no queued request could use."""
        for target in targets:
            if target.usable and target.replica.has_capacity:
                return self._grant(target)
        return None

    @contextmanager
    def slot_for_check(self, replica: Replica) -> Iterator[None]:
        """Hold a slot for a health check or a canary, which get one whatever the replica's state and load."""
        replica.acquire()
        try:
            yield
        finally:
            self.release(replica)

    def _grant(self, target: T) -> T:
        target.replica.acquire(target.slots)
        return target

    def enqueue(self, targets: Sequence[T], urgency: Urgency, *, beyond_limit: bool = False) -> Waiter[T]:
        """Raises QueueFullError unless `beyond_limit`, and UpstreamConnectError if every target is down."""
        if not any(target.usable for target in targets):
            raise UpstreamConnectError("down")
        if len(self.queue) >= self.limit and not beyond_limit:
            raise QueueFullError(
                f"all slots are taken and {self.limit} requests wait already; try again later", retry_after=5
            )
        loop = asyncio.get_running_loop()
        key = (loop.time() - HEAD_START_S[urgency], next(self._ticket))
        waiter = Waiter(key, targets, loop.create_future())
        bisect.insort(self.queue, waiter)
        return waiter

    async def wait(self, waiter: Waiter[T], timeout_factor: float = 1) -> T:
        """Wait for a slot, and leave the queue on every way out.

        `timeout_factor`: multiplies the longest wait. Raises QueueTimeoutError, and UpstreamConnectError if every
        target goes down.
        """
        timeout_s = self.timeout_s * timeout_factor
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter.future
        except TimeoutError:
            self._return_slot(waiter)
            raise QueueTimeoutError(
                f"no slot came free within {timeout_s:g} s; try again later", retry_after=5
            ) from None
        except asyncio.CancelledError:
            self._return_slot(waiter)
            raise
        finally:
            if waiter in self.queue:
                self.queue.remove(waiter)

    def _return_slot(self, waiter: Waiter[T]) -> None:
        """Release a slot that was granted in the same moment in which the wait ended."""
        if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
            target = waiter.future.result()
            self.release(target.replica, target.slots)

    def release(self, replica: Replica, slots: int = 1) -> None:
        replica.release(slots)
        self.dispatch(replica)

    def dispatch(self, replica: Replica) -> None:
        """Give the replica's free slots to queued requests. Called when a slot is released or the replica comes up."""
        if not self.queue:
            return
        for waiter in list(self.queue):
            if not replica.has_capacity:
                return
            target = next((each for each in waiter.targets if each.replica is replica and each.usable), None)
            if target is not None and not waiter.future.done():
                self.queue.remove(waiter)
                waiter.future.set_result(self._grant(target))

    def on_replica_down(self) -> None:
        """Fail waiters that have no live target left, so that they move to their next tier."""
        for waiter in list(self.queue):
            if not waiter.future.done() and not any(each.usable for each in waiter.targets):
                self.queue.remove(waiter)
                waiter.future.set_exception(UpstreamConnectError("went down while the request was queued"))
