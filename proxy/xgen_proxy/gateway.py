"""Builds the parts of the proxy from its settings, starts and stops them, and hands new settings to them."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.request_body import BodyBudget
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.discovery import Discovery
from xgen_proxy.fleet.health import HealthMonitor
from xgen_proxy.fleet.memory.watch import MemoryWatch
from xgen_proxy.forwarding.forwarder import Forwarder
from xgen_proxy.forwarding.outcome import Observer
from xgen_proxy.forwarding.retry_budget import RetryBudget
from xgen_proxy.observability.metrics import Metrics
from xgen_proxy.observability.observers import Observers
from xgen_proxy.observability.request_log import RequestLog
from xgen_proxy.routing.router import Router

if TYPE_CHECKING:
    from xgen_proxy.observability.tracing import Tracing


class Gateway:
    """`draining`: no new work is wanted, since the process is about to exit. `started` is in unix seconds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fleet = Fleet(settings)
        self.admission = Admission(settings.limits.queue, settings.limits.queue_timeout_s)
        self.bodies = BodyBudget()
        self.retry_budget = RetryBudget(settings.limits.queue_timeout_s)
        self.metrics = Metrics(self.fleet, self.admission)
        self.memory = MemoryWatch(self.fleet, self.admission, self.metrics.relief.inc)
        self.health = HealthMonitor(self.fleet, self.admission, self.memory, self.metrics.forget)
        self.metrics.of_fleet.model_pairs = lambda: self.health.tokenizers.pairs
        self.discovery = Discovery(self.fleet, self.health)
        self.router = Router(self.fleet, random.Random())
        self.tracing = tracing_for(settings)
        observers: list[Observer] = [self.metrics, RequestLog()]
        if self.tracing is not None:
            observers.append(self.tracing)
        self.observer = Observers(*observers)
        self.forwarder = Forwarder(
            self.router,
            self.admission,
            self.health,
            self.retry_budget,
            self.observer,
            settings.sse_keepalive_s,
            settings.routing.hold_constrained,
        )
        self.draining = False
        self.started = int(time.time())

    @property
    def ready(self) -> bool:
        """Suspect replicas are tried while none is up (routing rule 10)."""
        return not self.draining and any(replica.state in ("up", "suspect") for replica in self.fleet.replicas)

    def configure(self, settings: Settings) -> None:
        """Takes new settings, all or none. Requests in flight finish under the old ones."""
        old = self.settings
        try:
            removed = self.fleet.configure(settings)
        except Exception:
            self.fleet.configure(old)  # the backends that had taken the new ones
            raise
        self.settings = settings
        self.admission.limit = settings.limits.queue
        self.forwarder.sse_keepalive_s = settings.sse_keepalive_s
        self.forwarder.hold_constrained = settings.routing.hold_constrained
        self.admission.timeout_s = self.retry_budget.queue_timeout_s = settings.limits.queue_timeout_s
        for backend in removed:
            self.health.reconcile(backend, [], joined_later=True)
        self.discovery.lookup_soon()
        self.health.tokenizers.check_soon()

    async def start(self) -> None:
        self.health.start()
        await self.discovery.start()
        await self.health.initial_checks()

    async def stop(self) -> None:
        await self.discovery.stop()
        await self.health.stop()
        self.fleet.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


def tracing_for(settings: Settings) -> Tracing | None:
    if settings.otlp_endpoint is None:
        return None
    from xgen_proxy.observability.tracing import Tracing  # needs an extra, and takes a third of a second to import

    return Tracing(settings.otlp_endpoint)
