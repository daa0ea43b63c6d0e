"""OpenTelemetry traces: a span for each request, and below it one for each attempt, whose context goes to the backend.

Imported only if `otlp_endpoint` is set: the packages are the extra `otel`. Attributes:
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import asyncio

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xgen_proxy import __version__
from xgen_proxy.errors import ProxyError, UpstreamError
from xgen_proxy.forwarding.outcome import Observer, Outcome
from xgen_proxy.forwarding.usage import finish_reasons, usage_at_end
from xgen_proxy.request.call import Call
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.routing.router import Target

EXPORT_TIMEOUT_S = 5.0  # also the longest that a shutdown waits for a collector that does not answer
OPERATIONS = {
    "chat": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    **{name: name for name in OPAQUE},
}
CONTEXT = TraceContextTextMapPropagator()


class Tracing(Observer):
    """Exports spans. `endpoint` is a collector, as http://HOST:4318; a thread of its own sends the spans."""

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({"service.name": "xgen-proxy", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("xgen_proxy", __version__)
        self._requests: dict[int, Span] = {}  # by id(call)
        self._attempts: dict[int, Span] = {}

    def close(self) -> None:
        """Sends the remaining spans. Blocks."""
        self._provider.shutdown()

    def request_started(self, call: Call) -> None:
        lines = call.trace.decode("latin-1").splitlines()
        parent = CONTEXT.extract({name: value for name, _, value in (line.partition(": ") for line in lines)})
        span = self._requests[id(call)] = self._span(f"POST {call.features.endpoint}", SpanKind.SERVER, call, parent)
        span.set_attributes({"xgen.request_id": call.id, "gen_ai.request.stream": call.features.stream})

    def attempt_started(self, call: Call, target: Target, number: int) -> bytes | None:
        parent = set_span_in_context(self._requests[id(call)])
        name = f"{OPERATIONS[call.features.endpoint]} {call.model}"
        span = self._attempts[id(call)] = self._span(name, SpanKind.CLIENT, call, parent)
        span.set_attributes(
            {
                "gen_ai.provider.name": target.backend.dialect.name,
                "server.address": target.replica.pool.host,
                "server.port": target.replica.pool.port,
                "xgen.backend": target.backend.name,
                "xgen.replica": target.replica.name,
                "xgen.reason": target.reason,
            }
        )
        headers: dict[str, str] = {}
        CONTEXT.inject(headers, set_span_in_context(span))
        return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()

    def attempt_finished(self, call: Call, target: Target, error: BaseException | None, tail: bytes) -> None:
        span = self._attempts.pop(id(call))
        if isinstance(error, UpstreamError):
            fail(span, error.outcome)
        elif isinstance(error, ProxyError):
            fail(span, str(error.status))
        elif isinstance(error, asyncio.CancelledError):
            fail(span, "client_left")
        span.set_attributes(response_attributes(tail))
        span.end()

    def request_finished(self, call: Call, outcome: Outcome) -> None:
        span = self._requests.pop(id(call))
        span.set_attributes({"http.response.status_code": outcome.status, "xgen.attempts": outcome.attempts})
        if outcome.status >= 500:
            fail(span, str(outcome.status))
        elif outcome.interrupted is not None:
            fail(span, outcome.interrupted.outcome)
        span.end()

    def _span(self, name: str, kind: SpanKind, call: Call, parent: Context) -> Span:
        operation = OPERATIONS[call.features.endpoint]
        attributes = {"gen_ai.operation.name": operation, "gen_ai.request.model": call.model}
        span: Span = self._tracer.start_span(name, parent, kind, attributes)
        return span


def fail(span: Span, kind: str) -> None:
    """`kind` is one of few words, since messages may repeat the prompt."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def response_attributes(tail: bytes) -> dict[str, int | list[str]]:
    """`tail`: the last bytes of a response."""
    found: dict[str, int | list[str]] = {}
    if reasons := finish_reasons(tail):
        found["gen_ai.response.finish_reasons"] = reasons
    if usage := usage_at_end(tail):
        found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"] = usage
    return found
