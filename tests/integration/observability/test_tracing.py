"""Traces as a collector receives them over OTLP/HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pydantic import ValidationError

from tests.support.fake_upstream import FakeUpstream, Talk, delta, silent, status
from tests.support.running_proxy import RunningProxy, ask, backend, chat, get, post
from tests.support.waiting import wait_until
from xgen_proxy.config import settings
from xgen_proxy.config.settings import Settings

Start = Callable[..., RunningProxy]
ROOT = Path(__file__).resolve().parents[3]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
SECRET = "the-secret-of-this-prompt"


class Collector:
    """Receives what exporters send to /v1/traces."""

    def __init__(self) -> None:
        taken: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/traces":
                    taken.append(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.taken = taken
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        """In the order in which they ended."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.taken]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def value(any: AnyValue) -> Any:
    kind = any.WhichOneof("value")
    return [value(each) for each in any.array_value.values] if kind == "array_value" else getattr(any, kind or "")


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: value(each.value) for each in span.attributes}


def assert_received_context(fake: FakeUpstream, span: Span) -> None:
    """The flags are sampled and maybe random trace id."""
    expected = f"00-{span.trace_id.hex()}-{span.span_id.hex()}-0[13]"
    assert re.fullmatch(expected, fake.talks[-1].headers["traceparent"])


def test_a_request_has_a_span_and_one_for_its_attempt(start: Start, gpu: FakeUpstream, collector: Collector) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, otlp_endpoint=collector.url)
    messages = [{"role": "user", "content": SECRET}]
    assert chat(proxy, messages=messages, headers={**CONTEXT, "x-request-id": "find-me"}).status_code == 200
    proxy.stop()
    attempt, request = collector.spans()
    assert (request.name, request.kind) == ("POST chat", Span.SPAN_KIND_SERVER)
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(request) == {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.request.stream": False,
        "xgen.request_id": "find-me", "http.response.status_code": 200, "xgen.attempts": 1,
    }  # fmt: skip
    assert (attempt.name, attempt.kind) == ("chat m", Span.SPAN_KIND_CLIENT)
    assert (attempt.trace_id, attempt.parent_span_id) == (request.trace_id, request.span_id)
    found = attributes(attempt)
    assert found.pop("xgen.reason").startswith("only: ")
    assert found == {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.provider.name": "vllm",
        "server.address": "127.0.0.1", "server.port": gpu.port,
        "xgen.backend": "vllm", "xgen.replica": f"vllm@127.0.0.1:{gpu.port}",
        "gen_ai.response.finish_reasons": ["stop"], "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 1,
    }  # fmt: skip
    assert request.start_time_unix_nano <= attempt.start_time_unix_nano < attempt.end_time_unix_nano
    assert attempt.end_time_unix_nano <= request.end_time_unix_nano
    assert {attempt.status.code, request.status.code} == {Status.STATUS_CODE_UNSET}
    sent = gpu.talks[-1].headers
    assert sent["traceparent"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"
    assert sent["tracestate"] == "vendor=1"
    [body] = collector.taken
    assert SECRET.encode() not in body
    assert b"xgen-proxy" in body


def test_each_attempt_has_a_span(start: Start, gpu: FakeUpstream, cpu: FakeUpstream, collector: Collector) -> None:
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends, otlp_endpoint=collector.url)
    gpu.scripts.append(status(500))
    assert chat(proxy).status_code == 200
    proxy.stop()
    first, second, request = collector.spans()
    assert attributes(first)["error.type"] == "broken"
    assert first.status.code == Status.STATUS_CODE_ERROR
    assert "error.type" not in attributes(second)
    assert attributes(second)["xgen.backend"] == "llama_cpp"
    assert first.parent_span_id == second.parent_span_id == request.span_id
    assert (request.parent_span_id, attributes(request)["xgen.attempts"]) == (b"", 2)
    for fake, span in ((gpu, first), (cpu, second)):
        assert_received_context(fake, span)


def test_a_resumed_stream_has_a_span_for_each_attempt(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, collector: Collector
) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        talk.reset()

    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends, otlp_endpoint=collector.url)
    gpu.scripts.append(breaks)
    assert chat(proxy, stream=True).status_code == 200
    proxy.stop()
    first, second, request = collector.spans()
    assert attributes(first)["error.type"] == "broken"
    assert attributes(second)["gen_ai.response.finish_reasons"] == ["stop"]
    assert "error.type" not in attributes(second) | attributes(request)


def test_spans_of_failed_requests(start: Start, gpu: FakeUpstream, collector: Collector) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, otlp_endpoint=collector.url)
    assert chat(proxy, model="none").status_code == 404
    gpu.scripts = [status(400), status(503), silent]
    assert chat(proxy).status_code == 400
    assert chat(proxy).status_code == 503
    with ask(proxy):
        wait_until(lambda: len(gpu.talks) == 3)
    wait_until(lambda: "\nxgen_cancellations_total{" in get(f"{proxy.url}/metrics").text)
    proxy.stop()
    found = [(span.kind, attributes(span)) for span in collector.spans()]
    requests = [each for kind, each in found if kind == Span.SPAN_KIND_SERVER]
    attempts = [each for kind, each in found if kind == Span.SPAN_KIND_CLIENT]
    assert [each["http.response.status_code"] for each in requests] == [404, 400, 503, 499]
    assert [each.get("error.type") for each in requests] == [None, None, "503", None]
    assert [each["error.type"] for each in attempts] == ["400", "busy", "client_left"]


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_the_operation_is_named(start: Start, gpu: FakeUpstream, collector: Collector, path: str) -> None:
    async def text(talk: Talk) -> None:
        await talk.answer(200, {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})

    gpu.scripts.append(text)
    proxy = start(backends={"vllm": backend(gpu)}, otlp_endpoint=f"{collector.url}/")
    assert post(proxy.url + path, json={"model": "m", "prompt": "a"}).status_code == 200
    proxy.stop()
    assert {attributes(span)["gen_ai.operation.name"] for span in collector.spans()} == {"text_completion"}


def test_an_unsampled_trace_is_not_exported(start: Start, gpu: FakeUpstream, collector: Collector) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, otlp_endpoint=collector.url)
    assert chat(proxy, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).status_code == 200
    proxy.stop()
    assert collector.taken == []
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-00", gpu.talks[-1].headers["traceparent"])


def test_a_malformed_traceparent_starts_a_new_trace(start: Start, gpu: FakeUpstream, collector: Collector) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, otlp_endpoint=collector.url)
    assert chat(proxy, headers={"traceparent": SECRET, "tracestate": SECRET}).status_code == 200
    proxy.stop()
    attempt, request = collector.spans()
    assert request.parent_span_id == b""
    assert_received_context(gpu, attempt)
    assert SECRET not in str(gpu.talks[-1].headers)


def test_an_absent_collector_delays_nothing(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, otlp_endpoint="http://127.0.0.1:1")
    assert chat(proxy).status_code == 200
    proxy.stop()  # fails where that takes longer than 20 s


# without tracing


def test_without_tracing_the_clients_context_is_forwarded(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    assert chat(proxy, headers=CONTEXT).status_code == 200
    assert {name: gpu.talks[-1].headers[name] for name in CONTEXT} == CONTEXT
    assert chat(proxy).status_code == 200
    assert "traceparent" not in gpu.talks[-1].headers


def test_without_tracing_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from xgen_proxy.gateway import Gateway; from xgen_proxy.config.settings import Settings;"
        "import xgen_proxy.cli;"
        "Gateway(Settings(backends={'vllm': {'urls': 'http://127.0.0.1:1'}}));"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


@pytest.mark.parametrize("url", ["collector:4318", "grpc://collector:4317"])
def test_a_malformed_endpoint_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="write http://HOST:4318"):
        Settings(otlp_endpoint=url)
    assert Settings(otlp_endpoint="").otlp_endpoint is None


def test_tracing_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install .\.\[otel\]."):
        Settings(otlp_endpoint="http://collector:4318")
