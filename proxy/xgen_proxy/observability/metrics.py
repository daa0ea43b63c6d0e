"""Metrics and one log line per request. Labels are bounded: nothing a client sends freely becomes one, and prompts are
never logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xgen_proxy.errors import ProxyError, QueueFullError, RequestRejectedError, UpstreamError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.observability.fleet_metrics import FleetGauges
from xgen_proxy.observability.logging_setup import log, tell
from xgen_proxy.observability.metric_types import Counter, Histogram
from xgen_proxy.observability.usage import Usage, usage_at_end
from xgen_proxy.routing.router import Target

if TYPE_CHECKING:
    from xgen_proxy.forwarding.forwarder import Relay
    from xgen_proxy.gateway import Call

CLIENT_LEFT = 499  # nginx's number for it; nobody sees it but metrics and logs
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)


class Telemetry(Collector):
    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self._fleet = fleet
        self.requests = Counter(
            "xgen_requests", "Requests that had a plan, by what became of them.",
            ["endpoint", "backend", "replica", "model", "status", "reason"],
        )  # fmt: skip
        self.refusals = Counter(
            "xgen_refused_requests", "Requests that were refused before there was a plan.", ["endpoint", "code"]
        )
        self.failures = Counter(
            "xgen_attempt_failures", "Attempts that failed, whatever the client saw.", ["backend", "replica", "outcome"]
        )
        self.retries = Counter("xgen_retries", "Attempts after a request's first.", ["backend"])
        self.fallbacks = Counter(
            "xgen_fallbacks", "Answered by another backend (`to`) than the plan's first.", ["backend", "to"]
        )
        self.continuations = Counter(
            "xgen_continuations", "Streams that broke: where they went on, or `none`.", ["backend"], known=["none"]
        )
        self.cancellations = Counter(
            "xgen_cancellations", "Requests whose client left: in the queue, before the first output, or after it.",
            ["stage"], known=["queued", "waiting", "answering"],
        )  # fmt: skip
        self.rejections = Counter(
            "xgen_admission_rejections", "Requests without a slot: the queue was full, or the wait too long.",
            ["reason"], known=["queue_full", "queue_timeout"],
        )  # fmt: skip
        self.tokens = Counter(
            "xgen_tokens", "Tokens, where the backend told: of whole answers, and of streams with include_usage.",
            ["backend", "model", "type"],
        )  # fmt: skip
        self.reloads = Counter(
            "xgen_config_reloads", "New settings that were taken, or refused.", ["result"], known=["taken", "refused"]
        )
        self.duration = Histogram(
            "xgen_request_duration_seconds", "From the request to the end of the answer.", SECONDS,
            ["endpoint", "backend"],
        )  # fmt: skip
        self.first_output = Histogram(
            "xgen_time_to_first_token_seconds",
            "From the request to the first output, of streams.",
            SECONDS, ["endpoint", "backend"],
        )  # fmt: skip
        self.gaps = Histogram(
            "xgen_inter_chunk_seconds",
            "The mean gap between two chunks of a stream, one value a stream, of those that could go on elsewhere.",
            GAP_SECONDS, ["backend"],
        )  # fmt: skip
        self.overhead = Histogram(
            "xgen_overhead_seconds", "Until the first output, less the waiting for slots and backends.",
            OVERHEAD_SECONDS,
        )  # fmt: skip
        self.queue_wait = Histogram(
            "xgen_queue_wait_seconds", "In the queue for a slot, of those that had to wait.", SECONDS, ["urgency"]
        )
        self._registry = CollectorRegistry()
        self._registry.register(FleetGauges(fleet, admission))
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for series in self.all():
            yield series.family()

    def all(self) -> Iterator[Counter | Histogram]:
        return (series for series in vars(self).values() if isinstance(series, Counter | Histogram))

    def forget(self, replica: str) -> None:
        """The series of a replica that is gone."""
        for series in self.all():
            if isinstance(series, Counter):
                series.forget("replica", replica)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    # what happens

    def attempt_failed(self, request_id: str, candidate: Target, error: UpstreamError) -> None:
        self.failures.add(candidate.backend.name, candidate.replica.name, error.outcome)
        tell(logging.WARNING, "attempt failed", {
            "request_id": request_id, "replica": candidate.replica.name, "outcome": error.outcome, "error": error.reason,
        })  # fmt: skip

    def refused(
        self, request_id: str, endpoint: str, error: ProxyError, client: str | None, key: str | None = None
    ) -> None:
        """Before there was a plan. The message is not told: it says what the client sent."""
        code = error.code or error.type
        self.refusals.add(endpoint, code)
        line = {"request_id": request_id, "endpoint": endpoint, "status": error.status, "code": code}
        line |= {"client": client} if client is not None else {}
        line |= {"key": key} if key is not None else {}
        tell(logging.INFO, "refused", line)

    def finished(self, call: Call, relay: Relay, status: int, error: ProxyError | None = None) -> None:
        """`status`: CLIENT_LEFT when the client left. `error`: what the client was shown instead of an answer."""
        now = time.perf_counter()
        usage = usage_at_end(relay.ending) if relay.ending else None
        candidate, reply = relay.candidate, relay.reply
        if candidate is None:
            backend = replica = reason = "none"
        else:
            backend, replica = candidate.backend.name, candidate.replica.name
            reason = candidate.reason.partition(":")[0]
        endpoint = call.features.endpoint
        self.requests.add(endpoint, backend, replica, call.alias, str(status), reason)
        self.duration.add(now - call.started, endpoint, backend)
        if reply.first_output:
            first = reply.first_output - call.started
            if call.features.stream:
                self.first_output.add(first, endpoint, backend)
            self.overhead.add(max(first - relay.waited, 0.0))
            if candidate is not None:
                self._answered(candidate.backend, relay, usage)
            if reply.retained is not None and relay.ending and (chunks := reply.retained.count) > 1:
                self.gaps.add((now - reply.first_output) / (chunks - 1), backend)
        if isinstance(error, QueueFullError):
            self.rejections.add(error.reason)
        if relay.queued:
            self.queue_wait.add(relay.queued, call.features.urgency)
        if status == CLIENT_LEFT:
            self.cancellations.add("answering" if reply.status else "queued" if relay.left_queue else "waiting")
        if log.isEnabledFor(logging.INFO):
            tell(logging.INFO, "request", self._line(relay, status, error, usage, now))

    def _answered(self, backend: Backend, relay: Relay, usage: Usage | None) -> None:
        if backend.name != relay.plan.candidates[0].backend.name:
            self.fallbacks.add(relay.plan.candidates[0].backend.name, backend.name)
        if relay.broken or relay.continued:
            self.continuations.add("none" if relay.broken else backend.name)
        if usage is not None:
            self.tokens.inc_by(usage[0], backend.name, relay.call.alias, "input")
            self.tokens.inc_by(usage[1], backend.name, relay.call.alias, "output")

    def _line(
        self, relay: Relay, status: int, error: ProxyError | None, usage: Usage | None, now: float
    ) -> dict[str, Any]:
        """What is not known is left out."""
        call = relay.call
        features, reply, candidate, size = call.features, relay.reply, relay.candidate, relay.reply.size
        line: dict[str, Any] = {
            "request_id": call.id,
            "endpoint": features.endpoint,
            "model": call.alias,
            "stream": features.stream,
            "prompt_words": features.prompt_words,
            "status": status,
            "attempts": relay.attempts,
            "duration_s": int((now - call.started) * 1e4) / 1e4,
        }
        if call.client is not None:
            line["client"] = call.client
        if call.key is not None:
            line["key"] = call.key
        if candidate is not None:
            line["backend"] = candidate.backend.name
            line["replica"] = candidate.replica.name
            line["reason"] = candidate.reason
        if reply.first_output:
            line["ttft_s"] = int((reply.first_output - call.started) * 1e4) / 1e4
        if usage is not None:
            line["tokens_in"], line["tokens_out"] = usage
        if size is not None:
            line["bytes_out"] = size
        if relay.queued:
            line["queue_s"] = int(relay.queued * 1e4) / 1e4
        if error is not None or relay.failures:
            line |= _what_failed(relay, error)
        return line


def _what_failed(relay: Relay, error: ProxyError | None) -> dict[str, Any]:
    """In our own words: a backend's may repeat the prompt."""
    line: dict[str, Any] = {}
    if error is not None:
        line["code"] = "refused" if isinstance(error, RequestRejectedError) else error.code or error.type
    if relay.failures:
        line["failed"] = [{"replica": each.replica.name, "outcome": why.outcome} for each, why in relay.failures]
    if relay.continued:
        line["continued"] = relay.continued
    if relay.broken is not None:
        line["broken"] = relay.broken.reason
    return line
