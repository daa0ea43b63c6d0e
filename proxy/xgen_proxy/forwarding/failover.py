"""Tries the targets of a request until one succeeds.

An attempt holds one slot of its target from start to end and reports the result to the circuit breaker, the health
monitor and the observer, by whose fault it is (`UpstreamError.blame`). One request counts as one failure at most: if
it fails on several replicas, that is evidence against the request. The first attempt is free; all further ones before
the commit point share the retry budget.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import orjson

from xgen_proxy.errors import (
    Blame,
    MissingCapabilityError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
    RequestRejectedError,
    StreamInterruptedError,
    UpstreamConnectError,
    UpstreamError,
    all_failed,
)
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Backend
from xgen_proxy.fleet.health import HealthMonitor
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.forwarding.outcome import Failure, Observer
from xgen_proxy.forwarding.progress import Progress, Stopwatch
from xgen_proxy.forwarding.retry_budget import TIMEOUT_FACTOR, RetryBudget
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target

log = logging.getLogger("xgen_proxy")

# Asks one target, given the trace context for it as header lines. Raises UpstreamError to try the next target.
Work = Callable[[Target, bytes], Awaitable[None]]


def is_larger(backend: Backend, other: Backend) -> bool:
    """Whether a prompt that exceeds the context of `other` may fit into this one's. A context may be unknown."""
    return backend is not other and (backend.context is None or backend.context > (other.context or 0))


class Failover:
    """The attempts of one request. `remaining`: the targets that have not been tried."""

    def __init__(
        self,
        call: Call,
        targets: Sequence[Target],
        progress: Progress,
        admission: Admission,
        health: HealthMonitor,
        retry_budget: RetryBudget,
        observer: Observer,
    ) -> None:
        self.call = call
        self.remaining = list(targets)
        self.progress = progress
        self.admission = admission
        self.health = health
        self.retry_budget = retry_budget
        self.observer = observer
        self.resuming = False
        self.counted: set[Blame] = set()  # kinds of failures that this request has counted as
        self.doubted: list[Replica] = []  # their engines answered it with 5xx

    async def run(self, work: Work) -> None:
        """Raises ProxyError if every target fails, and StreamInterruptedError if a stream breaks after the commit."""
        try:
            await self._attempt(work)
        except UpstreamError:
            try:
                await self._retry(work)
            except UpstreamError:
                failures = self.progress.failures
                named = ((failure.target.replica.name, failure.error) for failure in failures)
                raise all_failed(named, self.call.model, may_fit_elsewhere=self._may_fit_elsewhere()) from None

    async def resume(self, targets: Sequence[Target], work: Work) -> None:
        """Runs `work` on new targets, after the commit point. Raises UpstreamError, the last one, if all fail.

        Resumed streams queue longer, however many wait: the client already has half an answer. They need no retry
        budget, since each takes the place of a stream that has just ended.
        """
        self.remaining = list(targets)
        self.resuming = True
        await self._until_success(work)

    async def _retry(self, work: Work) -> None:
        if not self.remaining:
            raise self.progress.failures[-1].error
        with self.progress.waiting:
            await self.retry_budget.acquire()
        self.progress.at_commit = self.retry_budget.release
        try:
            await self._until_success(work)
        finally:
            self.progress.commit()

    async def _until_success(self, work: Work) -> None:
        while self.remaining:
            with suppress(UpstreamError):
                return await self._attempt(work)
        raise self.progress.failures[-1].error

    async def _attempt(self, work: Work) -> None:
        target = await self._acquire_slot()
        progress = self.progress
        error: BaseException | None = None
        progress.target = target
        progress.attempts += 1
        try:
            trace = self.observer.attempt_started(self.call, target, progress.attempts)
            await work(target, self.call.trace if trace is None else trace)
            target.replica.succeeded()
            if self.doubted:
                self._convict()
        except UpstreamError as failed:
            error = failed
            self._record_failure(target, failed)
            raise
        except RequestRejectedError as rejected:
            if rejected.code != "context_length_exceeded":
                error = rejected
                raise
            error = PromptTooLongError(rejected.with_traceback(None))  # whose frames hold the failures: a circle
            self._record_failure(target, error)
            self.remaining = [other for other in self.remaining if is_larger(other.backend, target.backend)]
            raise error from None
        except StreamInterruptedError as interrupted:
            error = interrupted.error
            self._record_failure(target, interrupted.error)
            raise
        except BaseException as other:
            error = other
            raise
        finally:
            self.admission.release(target.replica, target.slots)
            self.observer.attempt_finished(self.call, target, error, progress.tail)
            error = None  # its traceback holds this frame: a circle, which would wait for the garbage collector

    def _record_failure(self, target: Target, error: UpstreamError) -> None:
        self.progress.failures.append(Failure(target, error))
        replica = target.replica
        if isinstance(error, UpstreamConnectError):
            self.health.mark_down(replica, str(error))
        elif isinstance(error, MissingCapabilityError):
            self._learn(target, error)
        elif error.blame == "request":
            self.remaining.clear()
        elif error.blame in ("replica", "unclear"):
            self._count(replica, error)

    def _count(self, replica: Replica, error: UpstreamError) -> None:
        if error.blame == "unclear":
            self.doubted.append(replica)
        if error.blame in self.counted:
            return
        self.counted.add(error.blame)
        if error.blame == "unclear":
            self.health.doubt(replica)
        else:
            replica.failed(error.reason)
            self.admission.on_replica_down()  # the circuit breaker may have opened

    def _may_fit_elsewhere(self) -> bool:
        """Whether a backend that the request may go to, down or not, has a larger context than those that refused the
        prompt: an agent that takes an outage for a long prompt drops its history for nothing."""
        features = self.call.features
        refused = [each.target.backend for each in self.progress.failures if isinstance(each.error, PromptTooLongError)]
        able = [
            backend
            for backend in self.health.fleet.backends
            if features.model in backend.models and features.needs <= backend.capabilities
        ]
        return features.fallback and any(all(is_larger(other, each) for each in refused) for other in able)

    def _convict(self) -> None:
        """The request is good, since it was served: what was unclear was the fault of those that failed."""
        request = hash(self.call.raw or orjson.dumps(self.call.body))
        for replica in self.doubted:
            self.health.convict(replica, request)
        self.doubted.clear()

    def _learn(self, target: Target, error: MissingCapabilityError) -> None:
        """Remember what the engine lacks, unless this request has no need of it: then it misunderstood something."""
        needed = error.capability in self.call.features.needs
        if needed and target.backend.lost_capability(target.replica, error.capability):
            log.warning("%s %s", target.replica.name, error.reason)

    async def _acquire_slot(self) -> Target:
        """A slot on the first free target of the next tier, which is then no longer remaining.

        The client of a resumed stream has half an answer: any tier will do. After a failure of ours, the next tier is
        tried rather than the request refused because this one's queue is full. Raises QueueFullError,
        QueueTimeoutError, and UpstreamConnectError if the whole tier is down, after removing it. The targets of the
        last tier that still answer health checks stay: they are tried rather than the request refused.
        """
        tier = self.remaining[0].tier
        targets = [target for target in self.remaining if self.resuming or target.tier == tier]
        others = [target for target in self.remaining if target not in targets]
        try:
            target = self.admission.try_acquire(targets) or await self._queue(targets, is_last=not others)
        except UpstreamConnectError as error:
            self.progress.failures += [Failure(target, error) for target in targets]
            self.remaining = others or [
                replace(target, panic=True) for target in targets if target.replica.answers and not target.panic
            ]
            raise
        except (QueueFullError, QueueTimeoutError):
            if not others or not self.progress.failures:
                raise
            self.remaining = others
            return await self._acquire_slot()
        self.remaining.remove(target)
        return target

    async def _queue(self, targets: Sequence[Target], *, is_last: bool) -> Target:
        """`is_last`: there are no other tiers. After a failure of ours, the request waits longer there, and if it had
        been admitted, however many wait: the retry budget bounds their number."""
        urgency = "high" if self.resuming else self.call.features.urgency
        admitted = self.resuming or (is_last and self.progress.attempts > 0)
        waiter = self.admission.enqueue(targets, urgency, beyond_limit=admitted)
        queueing = Stopwatch()
        try:
            with self.progress.waiting, queueing:
                return await self.admission.wait(waiter, TIMEOUT_FACTOR if is_last and self.progress.failures else 1)
        except asyncio.CancelledError:
            self.progress.left_queue = True
            raise
        finally:
            self.progress.queued += queueing.seconds
