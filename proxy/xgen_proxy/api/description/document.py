"""The OpenAPI document. https://spec.openapis.org/oas/v3.1.1.html"""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from xgen_proxy import __version__
from xgen_proxy.api.description import opaque, operations, translated
from xgen_proxy.api.description.answer_schemas import schemas
from xgen_proxy.api.description.operation import JSON, Operation, Schema, error_responses
from xgen_proxy.api.description.request_schemas import (
    HINT_MEANINGS,
    chat_request,
    completion_request,
    embeddings_request,
    generate_request,
    message,
)
from xgen_proxy.request.features import HINTS

OPERATIONS: tuple[Operation, ...] = (
    *operations.INFERENCE,
    *translated.OPERATIONS,
    *opaque.OPERATIONS,
    *operations.OPERATIONS_OF_THE_PROXY,
)

ABOUT = """\
An OpenAI-compatible proxy over vLLM (GPU) and llama.cpp (CPU). Each request goes to the backend that fits it; if one
fails, the next one answers, and a stream that breaks is continued by another.

As in OpenAI's API, null counts as not set. Errors have OpenAI's shape, and their messages say what to change."""
TAGS = {"Models": "What asks a model, and what there are.", "Operations": "For those who run the proxy."}

ANSWER_HEADERS = {
    "X-Request-Id": "The id of the request, which is in the log, too.",
    "X-Backend": "The backend that answered, or was tried last.",
    "X-Replica": "Its replica.",
    "X-Route-Reason": "Why the request went there.",
    "X-Model-Distance": "How far its model is from that of the reference (rule 12), if another backend answered.",
    "X-Attempts": "The number of attempts.",
    "X-Overhead-Ms": "Milliseconds until the first output, without the waiting for slots and backends.",
    "Request-Id": "The same, by Anthropic's name.",
    "X-Dropped": "What a request in another API asked for and no engine has.",
    "X-Should-Retry": "false where a retry cannot help, true where it should.",
    "Retry-After": "Seconds, where a later retry can help.",
    "Allow": "The methods that the path has.",
}
REQUEST_HEADERS = {
    "X-Request-Id": "The id of the request: 1 to 128 letters, digits, `.`, `_`, `-`. Anything else is replaced.",
    "traceparent": "W3C's trace context, which the backend gets.",
    "tracestate": "The same.",
}


@cache
def document() -> dict[str, Any]:
    """Takes tens of milliseconds the first time."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = operation.described()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "xgen-proxy",
            "version": __version__,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": description} for name, description in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {**request_bodies(), **schemas(), **translated.schemas()},
            "responses": error_responses(),
            "parameters": parameters(),
            "headers": {
                name: {"description": description, "schema": {"type": "string"}}
                for name, description in ANSWER_HEADERS.items()
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "One of the keys, where the setting api_keys is set.",
                },
                "x-api-key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-Api-Key",
                    "description": "The same key, as Anthropic's clients send it.",
                },
            },
        },
    }


def request_bodies() -> dict[str, Schema]:
    return {
        "ChatRequest": chat_request(),
        "CompletionRequest": completion_request(),
        "EmbeddingsRequest": embeddings_request(),
        "GenerateRequest": generate_request(),
        "Message": message(),
    }


def parameters() -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    }
    found["id"] = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    for name, description in REQUEST_HEADERS.items():
        found[name] = {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}
    for name in HINTS:
        header = "-".join(word.capitalize() for word in ["x", *name.split("_")])
        what = f"{HINT_MEANINGS[name]} A field of the body of that name wins, and then this is not looked at."
        found[header] = {"name": header, "in": "header", "description": what, "schema": {"type": "string"}}
    return found


@cache
def as_bytes() -> bytes:
    return orjson.dumps(document(), option=orjson.OPT_INDENT_2)


async def openapi(request: Request) -> Response:
    """Open, even where API keys are set: it is a function of the version, and tells nothing about this proxy."""
    return Response(await run_in_threadpool(as_bytes), media_type=JSON)
