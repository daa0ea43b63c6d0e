"""What each backend's errors mean. The bodies are those that the real servers sent."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.dialects.error_mapping import read_error, stream_error
from xgen_proxy.errors import RequestRejectedError, UpstreamOverloadedError, UpstreamProtocolError
from xgen_proxy.request.features import Json


def error(message: str, **fields: Any) -> Json:
    return {"error": {"message": message, **fields}}


LCP_LONG = (
    "This model's maximum context length is 2048 tokens. However, you requested 18035 tokens (18031 in the messages,"
    " 4 in the completion). Please reduce the length of the messages or completion."
)
LCP_INVALID = (
    "1 validation error:\n  {'type': 'less_than_equal', 'loc': ('body', 'top_p'), 'msg': 'Input should be less than or"
    " equal to 1', 'input': 2, 'ctx': {'le': 1.0}}\n\n  File \"/opt/venv/lib/python3.11/site-packages/llama_cpp/server/"
    'app.py", line 376, in create_chat_completion\n    POST /v1/chat/completions'
)
VLLM_MISSING = (
    "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required', 'input':"
    " {'secret': 'my prompt'}}"
)

# (what sent it, status, body, code, what the message must say)
CLIENTS: list[tuple[str, int, Any, str | None, str]] = [
    ("llama-cpp-python, too long", 400, error(LCP_LONG, type="invalid_request_error", param="messages",
     code="context_length_exceeded"), "context_length_exceeded", "2048"),
    ("llama-cpp-python, wrong value", 500, error(LCP_INVALID, type="internal_server_error"), None, "top_p"),
    ("llama-cpp-python, content parts", 500, error('can only concatenate str (not "list") to str'), None, "str"),
    ("llama-server, too long", 400, error("request (18031 tokens) exceeds the available context size (2048 tokens), try"
     " increasing it", code=400, type="exceed_context_size_error", n_ctx=2048), "context_length_exceeded", "18031"),
    ("llama-server, wrong type", 400, error("Field 'temperature': type must be number, but is string", code=400,
     type="invalid_request_error"), None, "temperature"),
    ("llama-server, broken JSON", 500, error("[json.exception.type_error.302] type must be array", code=500), None,
     "type"),
    ("llama-server, image", 500, error("image input is not supported - hint: mmproj", code=500), None, "image"),
    ("llama-server, tools", 500, error("Failed to parse tools: Missing tool type: 5", code=500), None, "tool"),
    ("llama-server, grammar", 400, error("Failed to initialize samplers: failed to parse grammar", code=400), None,
     "grammar"),
    ("vLLM, too long", 400, error("This model's maximum context length is 2048 tokens. However, your prompt contains at"
     " least 2049 input tokens", type="BadRequestError", param="input_tokens", code=400), "context_length_exceeded",
     "2049"),
    ("vLLM, longer prompt", 400, error("The decoder prompt (length 3000) is longer than the maximum model length of"
     " 2048.",
     code=400), "context_length_exceeded", "3000"),
    ("vLLM, missing field", 400, error(VLLM_MISSING, type="Bad Request", param="body.messages", code=400), None,
     "Field required"),
    ("vLLM, invalid UTF-8", 400, {"detail": "There was an error parsing the body"}, None, "parsing the body"),
    ("FastAPI", 422, {"detail": [{"loc": ["body", "a"], "msg": "Field required", "input": "my prompt"}]}, None,
     "Field"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "code", "says"), [each[1:] for each in CLIENTS], ids=[each[0] for each in CLIENTS]
)
def test_a_wrong_request_is_rejected(status: int, body: Any, code: str | None, says: str) -> None:
    verdict = read_error(status, orjson.dumps(body))
    assert isinstance(verdict, RequestRejectedError)
    assert 400 <= verdict.status < 500
    assert (verdict.type, verdict.code) == ("invalid_request_error", code)
    assert says in verdict.message
    for leak in ("my prompt", "site-packages", ".py", "/opt", "/v1/chat"):
        assert leak not in verdict.message
    assert verdict.param in (None, "messages")


# (what sent it, status, body)
FAILURES: list[tuple[str, int, bytes]] = [
    ("engine died", 500, orjson.dumps(error("EngineCore encountered an issue.", type="InternalServerError", code=500))),
    ("shutting down", 500, orjson.dumps(error("cannot schedule new futures after shutdown", code=500))),
    ("plain text", 500, b"Internal Server Error"),
    ("not JSON", 502, b"<html>Bad Gateway</html>"),
    ("nothing", 500, b""),
    ("a number", 500, b"5"),
    ("our key is wrong, vLLM", 401, b'{"error":"Unauthorized"}'),
    ("our key is wrong, llama-server", 401, orjson.dumps(error("Invalid API Key", code=401))),
    ("our key is wrong, llama-cpp-python", 401, b'{"detail":"Invalid API key"}'),
    ("forbidden", 403, b""),
    ("no such model", 404, orjson.dumps(error("The model `a` does not exist.", type="NotFoundError", code=404))),
    ("no such route", 404, b'{"detail":"Not Found"}'),
    ("no such method", 405, b'{"detail":"Method Not Allowed"}'),
    ("no embeddings", 501, orjson.dumps(error("This server does not support embeddings.", code=501))),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES])
def test_failures_that_another_backend_may_avoid(status: int, body: bytes) -> None:
    verdict = read_error(status, body)
    assert isinstance(verdict, UpstreamProtocolError)
    assert str(status) in str(verdict)


@pytest.mark.parametrize("status", [429, 503])
def test_429_and_503_mean_overloaded(status: int) -> None:
    assert isinstance(read_error(status, orjson.dumps(error("Loading model", code=status))), UpstreamOverloadedError)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (error(LCP_INVALID), "validation error: top_p: Input should be less than or equal to 1"),
        (error(VLLM_MISSING), "validation error: messages: Field required"),
        ({"detail": [{"loc": ["body", "a", 0], "msg": "it's wrong"}]}, "validation error: a.0: it's wrong"),
    ],
)
def test_printed_validation_errors_are_shortened(body: Any, message: str) -> None:
    verdict = read_error(400, orjson.dumps(body))
    assert isinstance(verdict, RequestRejectedError)
    assert verdict.message == message


def test_a_long_message_is_cut() -> None:
    verdict = read_error(400, orjson.dumps(error("x" * 10_000)))
    assert isinstance(verdict, RequestRejectedError)
    assert len(verdict.message) < 1000
    assert verdict.status == 400


def test_a_string_code_is_kept() -> None:
    verdict = read_error(400, orjson.dumps(error("no", code="my_code", param="stop")))
    assert isinstance(verdict, RequestRejectedError)
    assert (verdict.code, verdict.param) == ("my_code", "stop")


# (event, what it means)
EVENTS: list[tuple[bytes, type[Exception]]] = [
    (b'data: {"error": {"message": "EngineCore encountered an issue.", "code": 500}}\n\n', UpstreamProtocolError),
    (b'data: {"error": {"message": "The engine is currently busy", "code": 503}}\n\n', UpstreamOverloadedError),
    (b'data: {"error": {"message": "Grammar error: Invalid type: banana", "code": 400}}\n\n', RequestRejectedError),
    (b'data: {"error": {"message": "Failed to parse tools", "code": 500}}\n\n', RequestRejectedError),
    (b'data: {"error": {"message": "no code"}}\n\n', UpstreamProtocolError),
    (b'data: {"object":"error","message":"old shape","code":400}\n\n', RequestRejectedError),
    (b'error: {"code":500,"message":"llama-server of old"}\n\n', UpstreamProtocolError),
    (b"data: {broken\n\n", UpstreamProtocolError),
]  # fmt: skip


@pytest.mark.parametrize(("event", "meaning"), EVENTS)
def test_error_events(event: bytes, meaning: type[Exception]) -> None:
    assert type(stream_error(event)) is meaning
