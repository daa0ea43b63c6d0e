"""OpenTelemetry traces: a span for each request, and below it one for each attempt, whose context the backend gets.

Imported only where `otlp_endpoint` is set: the packages are the extra `otel`. Attributes:
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xgen_proxy import __version__
from xgen_proxy.errors import ProxyError, UpstreamError
from xgen_proxy.observability.usage import finish_reasons, usage_at_end
from xgen_proxy.routing.router import Target

if TYPE_CHECKING:
    from xgen_proxy.forwarding.forwarder import Relay
    from xgen_proxy.gateway import Call

EXPORT_TIMEOUT_S = 5.0  # also what the end of the process may wait for a collector that does not answer
OPERATIONS = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}
CONTEXT = TraceContextTextMapPropagator()

Work = Callable[[Target], Awaitable[None]]


class Tracing:
    """`endpoint`: a collector, as http://HOST:4318. Spans are sent by a thread of its own."""

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({"service.name": "xgen-proxy", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("xgen_proxy", __version__)

    def begin(self, call: Call) -> Trace:
        lines = call.trace.decode("latin-1").splitlines()
        parent = CONTEXT.extract({name: value for name, _, value in (line.partition(": ") for line in lines)})
        return Trace(self, call, self.span(f"POST {call.features.endpoint}", SpanKind.SERVER, call, parent))

    def span(self, name: str, kind: SpanKind, call: Call, parent: Context) -> Span:
        operation = OPERATIONS[call.features.endpoint]
        told = {"gen_ai.operation.name": operation, "gen_ai.request.model": call.alias}
        span: Span = self._tracer.start_span(name, parent, kind, told)
        return span

    def close(self) -> None:
        """Sends what is left. Blocks."""
        self._provider.shutdown()


class Trace:
    """One request's span. `call.trace` is what the backend of the present attempt is told."""

    def __init__(self, tracing: Tracing, call: Call, span: Span) -> None:
        self._tracing = tracing
        self._call = call
        self._span = span
        span.set_attributes({"xgen.request_id": call.id, "gen_ai.request.stream": call.features.stream})

    def around(self, work: Work, relay: Relay) -> Work:
        """`work` in a span of its own."""

        async def traced(candidate: Target) -> None:
            span = self._begin_attempt(candidate)
            try:
                await work(candidate)
                if relay.broken is not None:
                    fail(span, relay.broken.outcome)
                span.set_attributes(outcome_of(relay.ending))
            except UpstreamError as error:
                fail(span, error.outcome)
                raise
            except ProxyError as error:
                fail(span, str(error.status))
                raise
            except asyncio.CancelledError:
                fail(span, "client_left")
                raise
            finally:
                span.end()

        return traced

    def _begin_attempt(self, candidate: Target) -> Span:
        call, replica = self._call, candidate.replica
        name = f"{OPERATIONS[call.features.endpoint]} {call.alias}"
        span = self._tracing.span(name, SpanKind.CLIENT, call, set_span_in_context(self._span))
        span.set_attributes({
            "gen_ai.provider.name": candidate.backend.dialect.name,
            "server.address": replica.pool.host,
            "server.port": replica.pool.port,
            "xgen.backend": candidate.backend.name,
            "xgen.replica": replica.name,
            "xgen.reason": candidate.reason,
        })  # fmt: skip
        told: dict[str, str] = {}
        CONTEXT.inject(told, set_span_in_context(span))
        call.trace = "".join(f"{name}: {value}\r\n" for name, value in told.items()).encode()
        return span

    def end(self, relay: Relay | None, status: int) -> None:
        attempts = relay.attempts if relay is not None else 0
        self._span.set_attributes({"http.response.status_code": status, "xgen.attempts": attempts})
        if status >= 500:
            fail(self._span, str(status))
        elif relay is not None and relay.broken is not None:
            fail(self._span, relay.broken.outcome)
        self._span.end()


def fail(span: Span, kind: str) -> None:
    """`kind`: one of few words. Messages may repeat the prompt."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def outcome_of(ending: bytes) -> dict[str, int | list[str]]:
    """`ending`: the last bytes of an answer."""
    found: dict[str, int | list[str]] = {}
    if reasons := finish_reasons(ending):
        found["gen_ai.response.finish_reasons"] = reasons
    if usage := usage_at_end(ending):
        found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"] = usage
    return found
