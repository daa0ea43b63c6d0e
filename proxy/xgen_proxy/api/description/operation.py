"""Operation: one method of one path, and how it is written into an OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from xgen_proxy.errors import (
    BadGatewayError,
    BadRequestError,
    ProxyError,
    RequestRejectedError,
    ServiceUnavailableError,
)
from xgen_proxy.values import frozen

Schema = dict[str, Any]

JSON, EVENTS, PLAIN, HTML = "application/json", "text/event-stream", "text/plain", "text/html"

# Statuses that an operation may answer with, beside its own.
ANY = (400, 408, 431, 500, 503)  # whatever is asked: not HTTP, too slow, too large, a bug, too many connections
KEY = (401,)
BODY = (413, 415, 429)
MODEL = (404, 502, 504)  # and what a backend rejects

MEANINGS = {
    400: "The request is wrong: the message says what to change.",
    401: "The API key is missing or wrong.",
    404: "No such path, or no backend serves this model.",
    405: "Wrong method; the header Allow has the right one.",
    408: "Headers or body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON, or it is compressed.",
    429: "The proxy is full: of waiting requests, or of request bodies. Try again later.",
    431: "The headers are too large.",
    500: "A bug in the proxy; its log has the traceback.",
    502: "Every candidate was tried and failed.",
    503: "No backend can answer now.",
    504: "Every candidate was tried and failed, and the last one timed out.",
    529: "Anthropic's 503: no backend can answer now.",
}
REJECTED = "The backend rejects the request itself; its message says why."


@frozen
class Answer:
    """`content`: a schema for each media type. `headers`: names of components."""

    description: str
    content: Mapping[str, Schema]
    headers: tuple[str, ...] = ()


@frozen
class Operation:
    """`id`: the name of its function in generated clients. `answers`: by status, beside those of `errors`.
    `parameters`: names of components. `needs_key`: where `api_keys` is set. `asks_a_model`: a backend may reject the
    request. `error`: the component that its errors are, beside those of the server itself. `body_type`: the media type
    of the body."""

    method: str
    path: str
    id: str
    tag: str
    summary: str
    description: str
    answers: Mapping[int, Answer]
    body: Schema | None = None
    parameters: tuple[str, ...] = ()
    errors: tuple[int, ...] = ANY
    needs_key: bool = False
    asks_a_model: bool = False
    example: Mapping[str, Any] = field(default_factory=dict)
    error: str = "Error"
    body_type: str = JSON

    def described(self) -> dict[str, Any]:
        """The operation as OpenAPI has it: https://spec.openapis.org/oas/v3.1.1.html#operation-object"""
        found: dict[str, Any] = {
            "operationId": self.id,
            "tags": [self.tag],
            "summary": self.summary,
            "description": self.description,
            "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in self.parameters],
        }
        if self.body is not None:
            example = {"example": dict(self.example)} if self.example else {}
            found["requestBody"] = {"required": True, "content": {self.body_type: {"schema": self.body, **example}}}
        found["responses"] = dict(self._responses())
        found["security"] = [{"bearer": []}, {"x-api-key": []}, {}] if self.needs_key else []
        return found

    def _responses(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for status, answer in self.answers.items():
            yield (
                str(status),
                {
                    "description": answer.description,
                    "headers": headers(("X-Request-Id", *answer.headers) if answer.headers else ()),
                    "content": {media_type: {"schema": schema} for media_type, schema in answer.content.items()},
                },
            )
        failed = [str(status) for status in sorted(set(self.errors) - self.answers.keys())]
        for each in [*failed, "4XX"] if self.asks_a_model else failed:
            shared = {"$ref": f"#/components/responses/{each}"}
            yield each, shared if self.error == "Error" else self._failure(each)

    def _failure(self, status: str) -> dict[str, Any]:
        """In the words of another API, or in OpenAI's where the server itself refuses, before the route is known."""
        shapes = [{"$ref": f"#/components/schemas/{name}"} for name in (self.error, "Error")]
        meaning = REJECTED if status == "4XX" else MEANINGS[int(status)]
        return {"description": meaning, "content": {JSON: {"schema": {"anyOf": shapes}}}}


def headers(names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def error_classes(base: type[ProxyError] = ProxyError) -> Iterator[type[ProxyError]]:
    for each in base.__subclasses__():
        yield each
        yield from error_classes(each)


def codes_by_status() -> dict[int, list[str]]:
    """The codes that an error of each status may have; the type where it has none."""
    raised = [(each.status, each.code or each.type) for each in error_classes() if each is not RequestRejectedError]
    raised.append((504, BadGatewayError.code or ""))
    raised.append((ServiceUnavailableError.status, "all_backends_failed"))
    raised.append((BadRequestError.status, "context_length_exceeded"))
    found: dict[int, list[str]] = {}
    for status, code in raised:
        codes = found.setdefault(status, [])
        if code not in codes:
            codes.append(code)
    return found


def error_responses() -> dict[str, Any]:
    """The components that operations refer to."""
    content = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    of_all = headers(("X-Request-Id", "X-Should-Retry"))
    found: dict[str, Any] = {"4XX": {"description": REJECTED, "headers": of_all, "content": content}}
    for status, codes in sorted(codes_by_status().items()):
        extra = ("Retry-After",) if status in (429, 503) else ("Allow",) if status == 405 else ()
        found[str(status)] = {
            "description": f"{MEANINGS[status]} Codes: {', '.join(f'`{code}`' for code in codes)}.",
            "headers": {**of_all, **headers(extra)},
            "content": content,
        }
    return found
