"""Gets an answer to the client: attempts, the commit point, and what follows if the stream breaks after it.

plan ──▶ attempt ── slot ── connection ── first real output ══ commit ══▶ bytes … [DONE] ──▶ Outcome
           ▲  │        │         │                │                          │
           │  └────────┴─────────┴────────────────┘                          └─ broken: a new plan, and the stream
           │    refused, reset, 5xx, 429, silence: nothing was sent,            is resumed from its next character;
           └─── so the next target gets the request                             else one SSE error event, no [DONE]
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.types import Receive

from xgen_proxy.downstream.disconnect import DisconnectMonitor
from xgen_proxy.downstream.response_writer import KeepAlive, ResponseWriter
from xgen_proxy.errors import (
    ClientDisconnectedError,
    InternalServerError,
    ModelNotFoundError,
    ProxyError,
    StreamInterruptedError,
)
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.health import HealthMonitor
from xgen_proxy.forwarding.delivery import Delivery
from xgen_proxy.forwarding.failover import Failover
from xgen_proxy.forwarding.opaque.delivery import OpaqueDelivery
from xgen_proxy.forwarding.outcome import CLIENT_DISCONNECTED, Observer, Outcome
from xgen_proxy.forwarding.progress import Progress
from xgen_proxy.forwarding.resumption import Resumption
from xgen_proxy.forwarding.retry_budget import RetryBudget
from xgen_proxy.request.call import Call
from xgen_proxy.request.features import Features
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.routing.plan import Plan
from xgen_proxy.routing.router import Router, Target, sequences

log = logging.getLogger("xgen_proxy")


class Forwarder:
    """Serves all requests of a proxy; what belongs to one request is in Progress."""

    def __init__(
        self,
        router: Router,
        admission: Admission,
        health: HealthMonitor,
        retry_budget: RetryBudget,
        observer: Observer,
        sse_keepalive_s: float,
    ) -> None:
        self.router = router
        self.admission = admission
        self.health = health
        self.retry_budget = retry_budget
        self.observer = observer
        self.sse_keepalive_s = sse_keepalive_s
        self.disconnects = DisconnectMonitor()

    async def forward(self, call: Call, receive: Receive, writer: ResponseWriter) -> Outcome:
        """Answers the client and never raises, unless the task itself is cancelled.

        All work stops when the client disconnects.
        """
        progress = Progress(call)
        error: ProxyError | None = None
        try:
            targets = self.router.targets(await self._plan(call.features), sequences(call))
            progress.first_choice = targets[0]
            with self.disconnects.watch(receive):
                if self.sse_keepalive_s and call.features.stream and call.features.endpoint not in OPAQUE:
                    with KeepAlive(writer, self.sse_keepalive_s, [(b"x-request-id", call.id.encode())]):
                        await self._forward(call, targets, writer, progress)
                else:
                    await self._forward(call, targets, writer, progress)
        except ClientDisconnectedError:
            return progress.outcome(CLIENT_DISCONNECTED, writer)
        except ProxyError as known:
            error = known.with_traceback(None)  # the frames would hold it, and it them
        except Exception:
            log.exception("request %s", call.id)
            error = InternalServerError(f"internal error; the log has details under request {call.id}")
        if error is None:
            return progress.outcome(writer.status, writer)
        await writer.fail(error, progress.response_headers())
        return progress.outcome(error.status, writer, error)

    async def _plan(self, features: Features) -> Plan:
        """A model that no backend serves may have been loaded a moment ago. Raises ProxyError."""
        try:
            return self.router.plan(features)
        except ModelNotFoundError:
            if not await self.health.look_for_new_models():
                raise
        return self.router.plan(features)

    async def _forward(self, call: Call, targets: Sequence[Target], writer: ResponseWriter, progress: Progress) -> None:
        kind = OpaqueDelivery if call.features.endpoint in OPAQUE else Delivery
        delivery = kind(call, writer, progress)
        failover = Failover(call, targets, progress, self.admission, self.health, self.retry_budget, self.observer)
        self.retry_budget.request_started()
        try:
            await failover.run(delivery.deliver)
        except StreamInterruptedError as interruption:
            resumption = Resumption(call, writer, progress, delivery, failover, self.router)
            await resumption.resume(interruption.error)
        finally:
            self.retry_budget.request_finished()
            for failure in progress.failures:
                failure.error.__traceback__ = None  # its frames hold us and we hold it: a circle for the collector
