"""Who gets a replica's next free slot. No replica is sent more than it can run: llama.cpp queues without bound, and
llama-cpp-python breaks when asked for two things at once.

A request that finds no free slot waits here, in order of arrival shifted by urgency: an urgent one counts as come 30 s
earlier, a low one 30 s later. So everyone ages at the same pace and nobody starves. A slot that comes free goes to the
first in that order who can use it. A request is released from waiting when its client leaves, its time is up (429), or
every replica it could use is down (then its plan goes on).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from xgen_proxy.errors import QueueFullError, QueueTimeoutError, UpstreamConnectError
from xgen_proxy.fleet.backend import Replica
from xgen_proxy.request.features import Urgency

HEAD_START_S: dict[Urgency, float] = {"high": 30.0, "normal": 0.0, "low": -30.0}


class HasReplica(Protocol):
    @property
    def replica(self) -> Replica: ...


C = TypeVar("C", bound=HasReplica)


@dataclass(order=True, slots=True)
class Waiter(Generic[C]):
    key: tuple[float, int]
    candidates: Sequence[C] = field(compare=False)
    future: asyncio.Future[C] = field(compare=False)


class Admission:
    def __init__(self, limit: int, timeout_s: float) -> None:
        self.limit = limit
        self.timeout_s = timeout_s
        self.queue: list[Waiter[Any]] = []
        self._ticket = itertools.count()

    async def acquire(self, candidates: Sequence[C], urgency: Urgency, timeout_factor: float = 1) -> C:
        """Takes a slot on the first candidate that has one, or waits. Give it back with release().

        `patience`: how many times the usual limit it waits. Raises QueueFullError (the queue is full, or time is up) and
        UpstreamConnectError (every candidate is down).
        """
        return self.try_acquire(candidates) or await self.wait(self.enqueue(candidates, urgency), timeout_factor)

    def try_acquire(self, candidates: Sequence[C]) -> C | None:
        """A slot without waiting: one that is free here is one that nobody in the queue could use."""
        for candidate in candidates:
            if candidate.replica.up and candidate.replica.has_capacity:
                return self._grant(candidate)
        return None

    def _grant(self, candidate: C) -> C:
        candidate.replica.acquire()
        return candidate

    def enqueue(self, candidates: Sequence[C], urgency: Urgency) -> Waiter[C]:
        """A place in the queue, for wait(). Raises QueueFullError, and UpstreamConnectError where every candidate is down."""
        if not any(candidate.replica.up for candidate in candidates):
            raise UpstreamConnectError("down")
        if len(self.queue) >= self.limit:
            raise QueueFullError(
                f"all slots are taken and {self.limit} requests wait already; try again later", retry_after=5
            )
        loop = asyncio.get_running_loop()
        key = (loop.time() - HEAD_START_S[urgency], next(self._ticket))
        waiter = Waiter(key, candidates, loop.create_future())
        bisect.insort(self.queue, waiter)
        return waiter

    async def wait(self, waiter: Waiter[C], timeout_factor: float = 1) -> C:
        """Leaves the queue on every way out. Raises QueueTimeoutError, UpstreamConnectError."""
        timeout_s = self.timeout_s * timeout_factor
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter.future
        except TimeoutError:
            self._give_back(waiter)
            raise QueueTimeoutError(
                f"no slot came free within {timeout_s:g} s; try again later", retry_after=5
            ) from None
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        finally:
            if waiter in self.queue:
                self.queue.remove(waiter)

    def _give_back(self, waiter: Waiter[C]) -> None:
        """A slot that was granted in the very moment in which the waiting ended otherwise."""
        if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
            self.release(waiter.future.result().replica)

    def release(self, replica: Replica) -> None:
        replica.release()
        self.dispatch(replica)

    def dispatch(self, replica: Replica) -> None:
        """Gives the replica's free slots to those who wait for it. Called when a slot comes free or it comes up."""
        if not self.queue or not replica.up:
            return
        for waiter in list(self.queue):
            if not replica.has_capacity:
                return
            candidate = next((c for c in waiter.candidates if c.replica is replica), None)
            if candidate is not None and not waiter.future.done():
                self.queue.remove(waiter)
                waiter.future.set_result(self._grant(candidate))

    def on_replica_down(self) -> None:
        """Called when a replica is no longer up: those who wait for nothing that is go on with their plan."""
        for waiter in list(self.queue):
            if not waiter.future.done() and not any(c.replica.up for c in waiter.candidates):
                self.queue.remove(waiter)
                waiter.future.set_exception(UpstreamConnectError("went down while the request waited"))
