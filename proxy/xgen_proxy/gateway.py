"""What every route shares: the settings, the fleet, who waits, and the way from a request body to a plan."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from xgen_proxy.config.settings import Settings
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.discovery import Discovery
from xgen_proxy.fleet.health import HealthMonitor
from xgen_proxy.forwarding.retry_budget import RetryBudget
from xgen_proxy.observability.metrics import Telemetry
from xgen_proxy.request.features import Endpoint, Features, read_features, strip_hints
from xgen_proxy.request.presets import fill
from xgen_proxy.routing.plan import Plan
from xgen_proxy.routing.router import Router

if TYPE_CHECKING:
    from xgen_proxy.observability.tracing import Trace, Tracing


@dataclass(slots=True)
class Call:
    """One request, parsed. `body` is without hints and with presets; `raw` is the client's own bytes while they still
    say the same as `body`, else None. `alias` is the public model name. `started`: time.perf_counter(). `trace`: header
    lines for the backend. `client`: its address. `key`: the first 8 hex digits of the hash of the key it came in with.
    """

    id: str
    features: Features
    body: dict[str, Any]
    raw: bytes | None
    alias: str
    trace: bytes = b""
    span: Trace | None = None
    client: str | None = None
    key: str | None = None
    started: float = field(default_factory=time.perf_counter)


class Gateway:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fleet = Fleet(settings)
        self.admission = Admission(settings.limits.queue, settings.limits.queue_timeout_s)
        self.retries = RetryBudget(settings.limits.queue_timeout_s)
        self.telemetry = Telemetry(self.fleet, self.admission)
        self.monitor = HealthMonitor(self.fleet, self.admission, self.telemetry.forget)
        self.discovery = Discovery(self.fleet, self.monitor)
        self.tracing = tracing_for(settings)
        self.draining = False
        self.started = int(time.time())  # unix seconds
        self.router = Router(self.fleet, lambda: self.settings, random.Random())

    def call(
        self, id: str, endpoint: Endpoint, raw: bytes, body: dict[str, Any], headers: Mapping[bytes, bytes]
    ) -> Call:
        """Raises BadRequestError, ModelNotFoundError, ServiceUnavailableError."""
        features = read_features(body, headers, endpoint, self.settings.limits)
        alias = features.model or self.router.default_model()
        if not features.model:
            features = replace(features, model=alias)
        if not self.settings.routing.continuation:
            features = replace(features, continuation=False)
        changed = fill(strip_hints(body), features)
        trace = trace_lines(headers) if b"traceparent" in headers else b""
        return Call(id, features, changed, raw if changed is body else None, alias, trace)

    def plan(self, features: Features) -> Plan:
        """Raises ModelNotFoundError, ServiceUnavailableError."""
        return self.router.plan(features)

    def good_plan(self, features: Features) -> Plan:
        """A plan that has candidates. Raises ProxyError."""
        plan = self.plan(features)
        if plan.error is not None:
            raise plan.error
        return plan

    @property
    def ready(self) -> bool:
        return not self.draining and any(replica.up for replica in self.fleet.replicas)

    def configure(self, settings: Settings) -> None:
        """Takes new settings; what is in flight goes on."""
        self.settings = settings
        self.admission.limit = settings.limits.queue
        self.admission.timeout_s = self.retries.queue_timeout_s = settings.limits.queue_timeout_s
        for backend in self.fleet.configure(settings):
            self.monitor.reconcile(backend, [], joined_later=True)
        self.discovery.lookup_soon()

    async def start(self) -> None:
        self.monitor.start()
        await self.discovery.start()
        await self.monitor.initial_checks()

    async def stop(self) -> None:
        await self.discovery.stop()
        await self.monitor.stop()
        self.fleet.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


def tracing_for(settings: Settings) -> Tracing | None:
    if settings.otlp_endpoint is None:
        return None
    from xgen_proxy.observability.tracing import Tracing  # needs an extra, and takes a third of a second

    return Tracing(settings.otlp_endpoint)


def trace_lines(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's trace context, as it goes on: https://www.w3.org/TR/trace-context/"""
    lines = b"traceparent: " + headers.get(b"traceparent", b"") + b"\r\n"
    state = headers.get(b"tracestate", b"")
    return lines + b"tracestate: " + state + b"\r\n" if state else lines
