"""What a running proxy answers is what its document says: nothing is missing, and nothing more is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import orjson
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, RunningProxy, backend, get, post, running_proxy
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.api.description.document import document

KEY = {"Authorization": "Bearer sk-1"}
OURS = ("Error", "Generated", "Model", "Models", "Plan", "Fleet")  # not a backend's, which may have more


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu", tools=False)}
    with running_proxy(backends=backends, api_keys=[hash_key("sk-1")]) as running:
        yield running


def strict(schema: Any) -> Any:
    """With no fields but those that are described."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **{key: strict(value) for key, value in schema.items()}}


def check(answer: httpx.Response, method: str, path: str) -> None:
    """Status, media type, body and headers are as described."""
    described = document()["paths"][path][method]["responses"][str(answer.status_code)]
    if "$ref" in described:
        described = document()["components"]["responses"][described["$ref"].rpartition("/")[2]]
    media_type = answer.headers["content-type"].partition(";")[0]
    content = described["content"][media_type]
    if media_type != "application/json":
        return
    components = document()["components"]["schemas"]
    schemas = {name: strict(schema) if name in OURS else schema for name, schema in components.items()}
    schema = content["schema"] if path.startswith("/v1/") else strict(content["schema"])
    found = {**schema, "components": {"schemas": schemas}}
    jsonschema.Draft202012Validator(found).validate(answer.json())


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/models/status", "/metrics", "/openapi.json", "/docs"])
def test_open_routes(proxy: RunningProxy, path: str) -> None:
    answer = get(proxy.url + path)
    assert answer.status_code == 200
    check(answer, "get", path)


@pytest.mark.parametrize(("path", "asked"), [("/v1/models", "/v1/models"), ("/v1/models/{model}", "/v1/models/m")])
def test_models(proxy: RunningProxy, path: str, asked: str) -> None:
    answer = get(proxy.url + asked, headers=KEY)
    assert answer.status_code == 200
    check(answer, "get", path)
    refused = get(proxy.url + asked)
    assert refused.status_code == 401
    check(refused, "get", path)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"stream": True}, 200),
        ({"temperature": "hot"}, 400),
        ({"model": "none"}, 404),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "backend": "llama_cpp"}, 400),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/route"])
def test_requests(proxy: RunningProxy, path: str, fields: dict[str, Any], status: int) -> None:
    answer = post(proxy.url + path, json={**CHAT, **fields}, headers=KEY)
    assert answer.status_code == (200 if path == "/route" and "tools" in fields else status)
    check(answer, "post", path)
    headers = document()["paths"][path]["post"]["responses"]["200"]["headers"]
    sent = {name for name in answer.headers if name.startswith("x-")} - {"x-should-retry", "x-accel-buffering"}
    if path != "/route":
        assert sent <= {name.lower() for name in headers}


def test_other_statuses(proxy: RunningProxy) -> None:
    url, check_chat = f"{proxy.url}/v1/chat/completions", ("post", "/v1/chat/completions")
    unsupported = post(url, content=b"x", headers={**KEY, "Content-Type": "text/plain"})
    too_large = post(url, content=b"[" * 11_000_000, headers={**KEY, "Content-Type": "application/json"})
    assert (unsupported.status_code, too_large.status_code) == (415, 413)
    for answer in (unsupported, too_large):
        check(answer, *check_chat)


def test_not_ready(start: Any, gpu: FakeUpstream) -> None:
    gpu.kill()
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    answer = get(f"{proxy.url}/ready")
    assert answer.status_code == 503
    check(answer, "get", "/ready")
    check(post(f"{proxy.url}/v1/chat/completions", json=CHAT), "post", "/v1/chat/completions")


def test_the_document_is_open_and_the_same_for_every_proxy(proxy: RunningProxy) -> None:
    answer = get(f"{proxy.url}/openapi.json")
    assert orjson.loads(answer.content) == document()
    assert "vllm@" not in answer.text
    assert "127.0.0.1" not in answer.text
