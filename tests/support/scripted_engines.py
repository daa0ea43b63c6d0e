"""Scripted engines for httpx: each splits a text into words and finds the next number the likeliest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import httpx

from xgen_proxy.models.served.engines import VLLM, Engine, LlamaCppPython, LlamaServer

Json = dict[str, Any]
LIKELY = {1: 0.5, 2: 0.25}  # token → probability, at every position


def tokens_of(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def vllm(path: str, body: Json) -> Json:
    if path == "/tokenize":
        return {"tokens": tokens_of(body["prompt"])}
    if path == "/version":
        return {"version": "0.32.0"}
    if path == "/v1/models":
        return {"data": [{"id": "m", "owned_by": "vllm", "root": "models/m"}]}
    page = {str(id): {"logprob": math.log(p), "decoded_token": f"t{id}"} for id, p in LIKELY.items()}
    return {"choices": [{"prompt_logprobs": [None, *[page] * (len(body["prompt"]) - 1)]}]}


def llama_server(path: str, body: Json) -> Json:
    if path == "/tokenize":
        return {"tokens": tokens_of(body["content"])}
    if path == "/props":
        return {"build_info": "b1"}
    if path == "/v1/models":
        return {"data": [{"id": "m", "owned_by": "llamacpp", "meta": {"n_vocab": 9}}]}
    assert body["grammar"], "without it a part of a character has no probabilities"
    likely = [{"id": id, "bytes": list(b"t%d" % id), "logprob": math.log(p)} for id, p in LIKELY.items()]
    return {"completion_probabilities": [{"top_logprobs": likely}]}


def llama_cpp_python(path: str, body: Json) -> Json:
    if path == "/extras/tokenize":
        return {"tokens": tokens_of(body["input"])}
    if path == "/openapi.json":
        return {"info": {"version": "0.3.36"}}
    if path == "/v1/models":
        return {"data": [{"id": "m", "owned_by": "me"}]}
    page = {f"t{id}": math.log(p) for id, p in LIKELY.items()}
    pages = [None, *[page] * len(tokens_of(body["prompt"]))]
    return {"choices": [{"logprobs": {"top_logprobs": pages}}], "usage": {"completion_tokens": 1}}


SCRIPTS: dict[type[Engine], Callable[[str, Json], Json]] = {
    VLLM: vllm,
    LlamaServer: llama_server,
    LlamaCppPython: llama_cpp_python,
}


def client(script: Callable[[str, Json], Json]) -> httpx.Client:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=script(request.url.path, json.loads(request.content or b"{}")))

    return httpx.Client(transport=httpx.MockTransport(answer))


def engine(kind: type[Engine], script: Callable[[str, Json], Json] | None = None) -> Engine:
    return kind(client(script or SCRIPTS[kind]), f"http://{kind.name}", "m")
