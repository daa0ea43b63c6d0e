"""A proxy with a real backend behind it, and the requests that e2e tests send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
from openai.types.chat import ChatCompletionMessageParam

from tests.support.real_servers import MODEL, Proxy, Server

Json = dict[str, Any]

# A question that a model of 135M parameters answers correctly on every backend.
QUESTION = "What is the capital of France? Answer in one word."
CAPITAL: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]

# The same backend gives the same tokens each time. llama-cpp-python's default repeat_penalty is 1.1.
GREEDY: Json = {"temperature": 0, "seed": 1, "repeat_penalty": 1.0}

# Forbids SmolLM2's two end tokens, so that answers run to max_tokens.
NEVER_ENDING: Json = {"logit_bias": {"0": -100, "2": -100}}


def chat(content: str = QUESTION, **fields: Any) -> Json:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 12, **GREEDY, **fields}


@dataclass(frozen=True)
class ProxiedBackend:
    """`kind`: the backend's fixture. `name`: the backend's name in the X-Backend header."""

    kind: str
    name: str
    proxy: Proxy
    backend: Server

    @property
    def url(self) -> str:
        return self.proxy.url

    def post(self, path: str, body: Json, **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **kwargs)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def chat(self, content: str = QUESTION, **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat(content, **fields))

    def direct(self, path: str, body: Json) -> httpx.Response:
        """Send the request to the backend without the proxy."""
        return httpx.post(self.backend.url + path, json=body, timeout=60)

    def assert_answers(self) -> None:
        answer = self.chat("Hi", max_tokens=1)
        assert answer.status_code == 200, answer.text


def assert_openai_error(answer: httpx.Response, *statuses: int) -> Json:
    """Check status and shape of an OpenAI error, and that it leaks no paths or tracebacks. Returns the error."""
    assert answer.status_code in statuses, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["content-type"].startswith("application/json"), answer.headers
    body = answer.json()
    assert set(body) == {"error"}, body
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error), error
    assert isinstance(error["message"], str), error
    assert error["message"], error
    assert isinstance(error["type"], str), error
    assert error["code"] is None or isinstance(error["code"], str), error
    assert error["param"] is None or isinstance(error["param"], str), error
    for leak in ("site-packages", "Traceback", ".py", "/usr/"):
        assert leak not in answer.text, answer.text
    if answer.status_code < 500:
        assert answer.headers.get("x-should-retry", "false") == "false", answer.headers
    return dict(error)
