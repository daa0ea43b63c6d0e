"""Prometheus metrics of requests.

Labels are bounded: nothing that a client can send freely becomes one.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xgen_proxy.errors import QueueFullError, UpstreamError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.forwarding.outcome import BLOCKS, CLIENT_DISCONNECTED, Observer, Outcome, Refusal
from xgen_proxy.observability.fleet_metrics import FleetMetrics
from xgen_proxy.observability.log_output import DROPPED
from xgen_proxy.observability.metric_types import Counter, Histogram
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target
from xgen_proxy.supervision import restarts

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)


class Metrics(Collector, Observer):
    """Counts what happens, and renders the page behind /metrics."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self._define_counters()
        self._define_counters_of_models()
        self._define_histograms()
        self._registry = CollectorRegistry()
        self.of_fleet = FleetMetrics(fleet, admission)
        self._registry.register(self.of_fleet)
        self._registry.register(self)

    def _define_counters(self) -> None:
        self.requests = Counter(
            "xgen_requests",
            "Requests that could be routed, by outcome.",
            ["endpoint", "backend", "replica", "model", "status", "reason"],
        )
        self.refusals = Counter(
            "xgen_refused_requests", "Requests refused before they could be routed.", ["endpoint", "code"]
        )
        self.failures = Counter(
            "xgen_attempt_failures",
            "Attempts that failed, whatever the client received.",
            ["backend", "replica", "outcome"],
        )
        self.retries = Counter("xgen_retries", "Attempts after a request's first.", ["backend"])
        self.fallbacks = Counter(
            "xgen_fallbacks", "Requests answered by another backend (`to`) than the plan's first.", ["backend", "to"]
        )
        self.continuations = Counter(
            "xgen_continuations",
            "Streams that broke: the backend that resumed them, or `none`, and the kind of block they broke in.",
            ["backend", "block"],
        )
        self.continuations.values = {("none", block): 0.0 for block in BLOCKS}
        self.cancellations = Counter(
            "xgen_cancellations",
            "Requests whose client disconnected: in the queue, before the first output, or after it.",
            ["stage"],
            initial_labels=["queued", "waiting", "answering"],
        )
        self.rejections = Counter(
            "xgen_admission_rejections",
            "Requests that got no slot: the queue was full, or the wait too long.",
            ["reason"],
            initial_labels=["queue_full", "queue_timeout"],
        )
        self.tokens = Counter(
            "xgen_tokens",
            "Tokens, where the backend reports them: for whole responses, and for streams with include_usage.",
            ["backend", "model", "type"],
        )
        self.reloads = Counter(
            "xgen_config_reloads",
            "Reloads of the settings that were taken, or refused.",
            ["result"],
            initial_labels=["taken", "refused"],
        )
        self.restarts = Counter(
            "xgen_background_restarts", "Background tasks that ended or failed, and were started again.", ["task"]
        )
        self.restarts.values = restarts
        self.relief = Counter(
            "xgen_memory_relief",
            "Times that a replica short of memory was asked to free some (`memory_guard.relief`), by result.",
            ["backend", "replica", "result"],
        )
        self.dropped_log_lines = DROPPED

    def _define_counters_of_models(self) -> None:
        self.distant = Counter(
            "xgen_distant_answers",
            "Requests answered by another backend than the reference (rule 12), by the distance of its model.",
            ["backend", "distance"],
        )

    def _define_histograms(self) -> None:
        self.duration = Histogram(
            "xgen_request_duration_seconds",
            "From the request to the end of the response.",
            SECONDS,
            ["endpoint", "backend"],
        )
        self.first_output = Histogram(
            "xgen_time_to_first_token_seconds",
            "From the request to the first output of a stream.",
            SECONDS,
            ["endpoint", "backend"],
        )
        self.gaps = Histogram(
            "xgen_inter_chunk_seconds",
            "The mean gap between two chunks of a stream, one value per stream, for streams that could be resumed.",
            GAP_SECONDS,
            ["backend"],
        )
        self.overhead = Histogram(
            "xgen_overhead_seconds",
            "Until the first output, minus the time spent waiting for slots and backends.",
            OVERHEAD_SECONDS,
        )
        self.queue_wait = Histogram(
            "xgen_queue_wait_seconds", "Time in the queue for a slot, for requests that queued.", SECONDS, ["urgency"]
        )

    def collect(self) -> Iterator[Metric]:
        for metric in self.all():
            yield metric.to_metric_family()

    def all(self) -> Iterator[Counter | Histogram]:
        return (metric for metric in vars(self).values() if isinstance(metric, Counter | Histogram))

    def forget(self, replica: str) -> None:
        """Drops the series of a replica that was removed."""
        for metric in self.all():
            if isinstance(metric, Counter):
                metric.forget("replica", replica)

    def render(self) -> bytes:
        """The page in the Prometheus text format."""
        return generate_latest(self._registry)

    # Observer

    def request_refused(self, refusal: Refusal) -> None:
        error = refusal.error
        self.refusals.inc(refusal.endpoint, error.code or error.type)

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        if number > 1:
            self.retries.inc(target.backend.name)
        return None

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        if isinstance(error, UpstreamError):
            self.failures.inc(target.backend.name, target.replica.name, error.outcome)

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        if outcome.first_choice is None:
            if outcome.error is not None:
                self.request_refused(Refusal(call.origin, call.features.endpoint, outcome.error))
            return
        endpoint, target = call.features.endpoint, outcome.target
        if target is None:
            backend = replica = reason = "none"
        else:
            backend, replica = target.backend.name, target.replica.name
            reason = target.reason.partition(":")[0]
        self.requests.inc(endpoint, backend, replica, call.model, str(outcome.status), reason)
        self.duration.observe(outcome.finished - call.started, endpoint, backend)
        if outcome.first_output:
            self._count_output(call, outcome, backend)
        if isinstance(outcome.error, QueueFullError):
            self.rejections.inc(outcome.error.reason)
        if outcome.queued:
            self.queue_wait.observe(outcome.queued, call.features.urgency)
        if outcome.status == CLIENT_DISCONNECTED:
            stage = "answering" if outcome.first_output else "queued" if outcome.left_queue else "waiting"
            self.cancellations.inc(stage)

    def _count_output(self, call: Call, outcome: Outcome, backend: str) -> None:
        first = outcome.first_output - call.started
        if call.features.stream:
            self.first_output.observe(first, call.features.endpoint, backend)
        self.overhead.observe(max(first - outcome.waited, 0.0))
        first_choice = outcome.first_choice.backend.name if outcome.first_choice is not None else backend
        if backend != first_choice:
            self.fallbacks.inc(first_choice, backend)
        if outcome.target is not None and outcome.target.distance:
            self.distant.inc(backend, _class_of(outcome.target.distance))
        if outcome.interrupted is not None or outcome.resumed:
            self.continuations.inc("none" if outcome.interrupted is not None else backend, outcome.broken_in)
        if outcome.usage is not None:
            self.tokens.inc_by(outcome.usage[0], backend, call.model, "input")
            self.tokens.inc_by(outcome.usage[1], backend, call.model, "output")
        if outcome.chunks is not None and outcome.chunks > 1 and outcome.completed:
            self.gaps.observe((outcome.finished - outcome.first_output) / (outcome.chunks - 1), backend)


def _class_of(distance: str) -> str:
    if distance == "unknown":
        return "unknown"
    return "near" if distance.startswith("top1") and not distance.endswith("far") else "far"
