"""Metrics and one log line per request. Labels are bounded: nothing a client sends freely becomes one, and prompts are
never logged."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from proxy.admission import Admission
from proxy.errors import UpstreamFailed
from proxy.fleet import Fleet
from proxy.policy import Candidate
from proxy.series import Counts, Times

if TYPE_CHECKING:
    from proxy.gateway import Call
    from proxy.relay import Relay

log = logging.getLogger("xgen_proxy.request")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)


BLANK = logging.makeLogRecord({"name": log.name}).__dict__


def tell(level: int, message: str, fields: dict[str, Any]) -> None:
    """What log.log() does, without looking for what no line of ours has: caller, thread and process."""
    if not log.isEnabledFor(level):
        return
    record = logging.LogRecord.__new__(logging.LogRecord)
    now = time.time()
    record.__dict__.update(BLANK)
    record.__dict__.update(
        levelno=level, levelname=logging.getLevelName(level), msg=message, created=now, msecs=now % 1 * 1000,
        fields=fields,
    )  # fmt: skip
    log.handle(record)


class FleetGauges(Collector):
    """Read off the fleet when scraped, so that they cannot drift from it and vanish with a removed replica."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.fleet = fleet
        self.admission = admission

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["backend", "replica"]
        up = GaugeMetricFamily("xgen_replica_up", "1: the replica takes requests.", labels=labels)
        load = GaugeMetricFamily("xgen_replica_load", "0 idle, 1 full; see routing rule 5.", labels=labels)
        in_flight = GaugeMetricFamily("xgen_replica_in_flight", "Requests that hold one of its slots.", labels=labels)
        slots = GaugeMetricFamily("xgen_replica_slots", "Requests it runs at once.", labels=labels)
        for replica in self.fleet.replicas:
            names = [replica.backend.name, replica.name]
            up.add_metric(names, float(replica.up))
            load.add_metric(names, replica.load)
            in_flight.add_metric(names, replica.in_flight)
            slots.add_metric(names, replica.slots)
        yield from (up, load, in_flight, slots)
        queued = GaugeMetricFamily("xgen_queue_requests", "Requests that wait for a slot.")
        queued.add_metric([], len(self.admission.waiting))
        yield queued


class Telemetry(Collector):
    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.requests = Counts(
            "xgen_requests", "Requests by what became of them.", ["endpoint", "backend", "status", "reason"]
        )
        self.failures = Counts(
            "xgen_attempt_failures", "Attempts that failed, whatever the client saw.", ["backend", "replica", "outcome"]
        )
        self.continuations = Counts(
            "xgen_continuations", "Streams that broke: where they went on, or `none`.", ["backend"]
        )
        self.reloads = Counts("xgen_config_reloads", "New settings that were taken, or refused.", ["result"])
        self.left = Counts("xgen_clients_left", "Requests whose client went away first.")
        self.duration = Times(
            "xgen_request_seconds", "From the request to the end of the answer.", SECONDS, ["endpoint", "backend"]
        )
        self.first_output = Times(
            "xgen_first_output_seconds", "From the request to the first byte of the answer (TTFT for streams).",
            SECONDS, ["endpoint", "backend"],
        )  # fmt: skip
        self.overhead = Times(
            "xgen_overhead_seconds", "Until the first output, less the waiting for slots and backends.",
            OVERHEAD_SECONDS,
        )  # fmt: skip
        self._registry = CollectorRegistry()
        self._registry.register(FleetGauges(fleet, admission))
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for series in vars(self).values():
            if isinstance(series, Counts | Times):
                yield series.family()

    def forget(self, replica: str) -> None:
        """The series of a replica that is gone."""
        for series in vars(self).values():
            if isinstance(series, Counts):
                series.forget("replica", replica)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def attempt_failed(self, request_id: str, candidate: Candidate, error: UpstreamFailed) -> None:
        self.failures.add(candidate.backend.name, candidate.replica.name, error.outcome)
        tell(logging.WARNING, "attempt failed", {
            "request_id": request_id, "replica": candidate.replica.name, "outcome": error.outcome, "error": error.why,
        })  # fmt: skip

    def finished(self, call: Call, relay: Relay, status: int) -> None:
        """`status`: 499 when the client left."""
        now = time.perf_counter()
        backend = relay.candidate.backend.name if relay.candidate else "none"
        reason = relay.candidate.reason.partition(":")[0] if relay.candidate else "none"
        endpoint = call.features.endpoint
        self.requests.add(endpoint, backend, str(status), reason)
        self.duration.add(now - call.started, endpoint, backend)
        if relay.reply.first_output:
            self.first_output.add(relay.reply.first_output - call.started, endpoint, backend)
            self.overhead.add(max(relay.reply.first_output - call.started - relay.waited, 0.0))
        if relay.broken or relay.continued:
            self.continuations.add("none" if relay.broken else backend)
        if status == 499:
            self.left.add()
        if log.isEnabledFor(logging.INFO):
            tell(logging.INFO, "request", self._fields(call, relay, status, now))

    def _fields(self, call: Call, relay: Relay, status: int, now: float) -> dict[str, Any]:
        candidate = relay.candidate
        return {
            "request_id": call.id,
            "endpoint": call.features.endpoint,
            "model": call.alias,
            "status": status,
            "replica": candidate.replica.name if candidate else None,
            "reason": candidate.reason if candidate else None,
            "attempts": relay.attempts,
            "continued": relay.continued,
            "broken": relay.broken.why if relay.broken else None,
            "stream": call.features.stream,
            "prompt_words": call.features.prompt_words,
            "first_output_s": round(relay.reply.first_output - call.started, 4) if relay.reply.first_output else None,
            "duration_s": round(now - call.started, 4),
        }


class Lines(logging.Handler):
    """To stderr, all lines of one turn of the event loop in one write: a write for each would cost more than the rest
    of the line."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[str] = []

    def handle(self, record: logging.LogRecord) -> bool:
        """Without a lock, which appending to a list does not need."""
        self._waiting.append(self.format(record))
        if len(self._waiting) == 1:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # no loop runs in this thread
                self.flush()
        return True

    def flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if lines:
            sys.stderr.write("\n".join(lines) + "\n")
            sys.stderr.flush()


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items() if value is not None)
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logging(log_format: str) -> None:
    """To stderr; stdout is for what commands print."""
    plain = log_format == "plain" or (log_format == "auto" and sys.stderr.isatty())
    handler = Lines()
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Nobody formats these, and finding them costs more than the line: docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
