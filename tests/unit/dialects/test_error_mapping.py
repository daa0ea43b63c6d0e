"""What each backend's errors mean. The bodies are those that the real servers sent."""

from __future__ import annotations

import math
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cpu_time import TRIES, slowness, untraced
from xgen_proxy.dialects import error_mapping
from xgen_proxy.dialects.error_mapping import as_long_prompt, read_error, stream_error
from xgen_proxy.errors import (
    Blame,
    MissingCapabilityError,
    RequestRejectedError,
    UnsupportedByBackendError,
    UpstreamError,
    UpstreamOverloadedError,
    UpstreamServerError,
)
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
JINJA = (
    "\n------------\nWhile executing CallExpression at line 47, column 32 in source:\nError: Jinja Exception: After"
    " the optional system message, conversation roles must alternate user and assistant roles"
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
    ("llama-server, image", 400, error("Failed to load image or audio file", code=400), None, "load image"),
    ("llama-server, template", 500, error(JINJA, code=500, type="server_error"), None, "roles must alternate"),
    ("llama-cpp-python, template", 500, error("Conversation roles must alternate user/assistant/user/..."), None,
     "roles must alternate"),
    ("llama-cpp-python, Gemma's template", 500, error("System role not supported"), None, "System role"),
    ("llama-server, tool call", 500, error("Failed to parse tool call arguments as JSON: [json.exception]", code=500),
     None, "tool call"),
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


# (what sent it, status, body, whose fault it is)
FAILURES: list[tuple[str, int, bytes, Blame]] = [
    ("engine died", 500, orjson.dumps(error("EngineCore encountered an issue.", type="InternalServerError", code=500)),
     "unclear"),
    ("shutting down", 500, orjson.dumps(error("cannot schedule new futures after shutdown", code=500)), "unclear"),
    ("plain text", 500, b"Internal Server Error", "unclear"),
    ("not JSON", 502, b"<html>Bad Gateway</html>", "unclear"),
    ("nothing", 500, b"", "unclear"),
    ("a number", 500, b"5", "unclear"),
    ("a redirect", 302, b"", "replica"),
    ("no content", 204, b"", "replica"),
    ("our key is wrong, vLLM", 401, b'{"error":"Unauthorized"}', "engine"),
    ("our key is wrong, llama-server", 401, orjson.dumps(error("Invalid API Key", code=401)), "engine"),
    ("our key is wrong, llama-cpp-python", 401, b'{"detail":"Invalid API key"}', "engine"),
    ("forbidden", 403, b"", "engine"),
    ("no such model", 404, orjson.dumps(error("The model `a` does not exist.", type="NotFoundError", code=404)),
     "engine"),
    ("no such route", 404, b'{"detail":"Not Found"}', "engine"),
    ("no such method", 405, b'{"detail":"Method Not Allowed"}', "engine"),
    ("a proxy in between wants a password", 407, b"", "engine"),
    ("our request came too slowly", 408, b"<html>", "unclear"),
    ("too early", 425, b"{}", "unclear"),
    ("nginx's word for a connection that was closed", 499, b"", "unclear"),
    ("not implemented", 501, orjson.dumps(error("This server does not support that.", code=501)), "engine"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "blame"), [case[1:] for case in FAILURES], ids=[each[0] for each in FAILURES]
)
def test_failures_that_another_backend_may_avoid(status: int, body: bytes, blame: Blame) -> None:
    verdict = read_error(status, body)
    assert isinstance(verdict, UpstreamError)
    assert str(status) in str(verdict)
    assert verdict.blame == blame


AUTO_TOOLS = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'

# (status, message, the capability that the engine was started without)
CONFESSIONS: list[tuple[int, str, str]] = [
    (400, AUTO_TOOLS, "tools"),
    (400, 'tool_choice="required" requires --tool-call-parser to be set', "tools"),
    (500, "tools param requires --jinja flag", "tools"),
    (400, "smollm2 is not a multimodal model", "images"),
    (400, "org/smollm2 is not a multimodal model None", "images"),
    (400, "/models/org/smollm2 is not a multimodal model", "images"),
    (400, "At most 0 image(s) may be provided in one prompt.", "images"),
    (400, "At most 0 audio(s) may be provided in one prompt.", "audio"),
    (400, "At most 0 video(s) may be provided in one prompt.", "video"),
    (500, "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj", "images"),
    (500, "audio input is not supported - hint: if this is unexpected, you may need to provide the mmproj", "audio"),
    (500, "video input is not supported - hint: if this is unexpected, you may need to provide the mmproj", "video"),
    (501, "This server does not support embeddings. Start it with `--embeddings`", "embeddings"),
    (400, "The model does not support Embeddings API", "embeddings"),
    (500, "Llama model must be created with embedding=True to call this method", "embeddings"),
    (400, "Pooling type 'none' is not OAI compatible. Please use a different pooling type", "embeddings"),
    (500, "logprobs is not supported for models created with logits_all=False", "logprobs"),
    (501, "This server does not support reranking. Start it with `--reranking`", "rerank"),
    (400, "The model does not support Rerank (Score) API", "rerank"),
    (400, "The model does not support Score API", "score"),
    (400, "This model does not support the Scoring API.", "score"),
    (400, "The model does not support Classification API", "classify"),
    (501, "The current model does not support audio input.", "transcriptions"),
    (400, "The model does not support Transcriptions API", "transcriptions"),
    (400, "The model does not support Translations API", "translations"),
    (501, "This server does not support completions. Start it without `--embeddings`", "generation"),
    (400, "The model does not support Chat Completions API", "generation"),
]


@pytest.mark.parametrize(("status", "message", "capability"), CONFESSIONS, ids=[each[1][:40] for each in CONFESSIONS])
def test_an_engine_confesses_what_it_was_started_without(status: int, message: str, capability: str) -> None:
    for verdict in (
        read_error(status, orjson.dumps(error(message, code=status))),
        stream_error(b"data: " + orjson.dumps(error(message, code=status)) + b"\n\n"),
    ):
        assert isinstance(verdict, MissingCapabilityError)
        assert (verdict.capability, verdict.blame) == (capability, "engine")


@pytest.mark.parametrize("message", [each[1] for each in CONFESSIONS])
def test_a_client_cannot_make_an_engine_confess(message: str) -> None:
    """Engines repeat what a client sent; one repeated sentence must not take a capability from everybody."""
    for status, echo in ((500, f"Unknown reasoning format: {message}"), (400, f"'{message}' is not valid"),
                         (400, f"x\n{message}"), (400, f"{message}\nx")):  # fmt: skip
        assert not isinstance(read_error(status, orjson.dumps(error(echo))), MissingCapabilityError)


# (message, param that the engine names)
OUTPUT_TOO_LONG = [
    ("'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum context length is 8192 tokens"
     " and your request has 12 input tokens (32000 > 8192 - 12).", None),
    ("max_tokens=32000 cannot be greater than max_model_len=8192. Please request fewer output tokens.", "max_tokens"),
    ("This model's maximum context length is 2048 tokens. However, you requested 2048 output tokens and your prompt"
     " contains at least 1 input tokens, for a total of at least 2049 tokens.", "input_tokens"),
    ("This model's maximum context length is 8192 tokens. However, you requested 32012 tokens (12 in the messages,"
     " 32000 in the completion). Please reduce the length of the messages or completion.", "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "param"), OUTPUT_TOO_LONG)
def test_max_tokens_beyond_the_context_is_no_long_prompt(message: str, param: str | None) -> None:
    verdict = read_error(400, orjson.dumps(error(message, param=param, code="context_length_exceeded")))
    assert isinstance(verdict, RequestRejectedError)
    assert (verdict.status, verdict.param, verdict.code) == (400, "max_tokens", None)


AT_LEAST = (
    "This model's maximum context length is 65536 tokens. However, you requested 32000 output tokens and your prompt"
    " contains at least {} input tokens, for a total of at least {} tokens."
)


def test_a_prompt_of_which_vllm_tells_only_the_least_may_be_too_long() -> None:
    """It counts up to 65536 - 32000 + 1."""
    told = read_error(400, orjson.dumps(error(AT_LEAST.format(33537, 65537), param="input_tokens")))
    assert isinstance(told, RequestRejectedError)
    assert (told.param, told.code) == ("max_tokens", None)
    assert (as_long_prompt(told).param, as_long_prompt(told).code) == (None, "context_length_exceeded")
    exact = read_error(400, orjson.dumps(error(AT_LEAST.format(40000, 72000), param="input_tokens")))
    assert isinstance(exact, RequestRejectedError)
    assert as_long_prompt(exact) is exact


def test_a_prompt_that_leaves_no_token_is_too_long() -> None:
    verdict = read_error(400, orjson.dumps(error("max_tokens must be at least 1, got 0.", param="max_tokens")))
    assert isinstance(verdict, RequestRejectedError)
    assert (verdict.param, verdict.code) == (None, "context_length_exceeded")


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
    (b'data: {"error": {"message": "EngineCore encountered an issue.", "code": 500}}\n\n', UpstreamServerError),
    (b'data: {"error": {"message": "The engine is currently busy", "code": 503}}\n\n', UpstreamOverloadedError),
    (b'data: {"error": {"message": "Grammar error: Invalid type: banana", "code": 400}}\n\n', RequestRejectedError),
    (b'data: {"error": {"message": "Failed to parse tools", "code": 500}}\n\n', RequestRejectedError),
    (b'data: {"error": {"message": "Failed to parse input at pos 31: <tool_call>", "code": 500}}\n\n',
     UpstreamServerError),
    (b'data: {"error": {"message": "no code"}}\n\n', UpstreamServerError),
    (b'data: {"object":"error","message":"old shape","code":400}\n\n', RequestRejectedError),
    (b'error: {"code":500,"message":"llama-server of old"}\n\n', UpstreamServerError),
    (b"data: {broken\n\n", UpstreamServerError),
]  # fmt: skip


@pytest.mark.parametrize(("event", "meaning"), EVENTS)
def test_error_events(event: bytes, meaning: type[Exception]) -> None:
    assert type(stream_error(event)) is meaning


# Work on what another side sent: engines repeat what a client sent, at any length.

SEEDS = [
    "'loc': [", "'loc': ('a', ", "'loc': 'x', 'msg': \"", "'msg': '", "/a", "/", "a/", "./", "x", "\\", '"', "{", "[",
    "1 validation error: ", "maximum context length is 1 tokens", "requested 1 tokens ", "Jinja Exception: ", "é", "\n",
    "requested 1 output tokens and your prompt contains at least ", "max_tokens must be at least 1, got ",
    "max_tokens=1", "11111", "tool_choice ", "is not a multimodal model", "(1 in the", " ", "\x00",
]  # fmt: skip
PREFIXES = ["", "1 validation error: {'loc': ['x'], 'msg': 'y", "At most 0 image(s) may be provided in one prompt"]
FUNCTIONS = sorted(
    name for name, each in vars(error_mapping).items() if callable(each) and each.__module__ == error_mapping.__name__
)


def call(name: str, text: str) -> None:
    """Calls one function of error_mapping with `text` wherever another side's words can be."""
    raw = text.encode("utf-8", "replace")
    body = orjson.dumps(error(text, param=text, code=text))
    match name:
        case "read_error":
            for status in (302, 400, 404, 422, 500, 503):
                for data in (body, raw, orjson.dumps({"detail": [{"loc": [text], "msg": text}]})):
                    read_error(status, data)
        case "stream_error":
            for event in (b"data: " + body + b"\n\n", b"error: " + raw + b"\n\n", b"data: " + raw):
                stream_error(event)
        case "_fields":
            for data in (raw, body):
                error_mapping._fields(data)
        case "_clean":
            error_mapping._clean(text)
        case "_as_text":
            error_mapping._as_text([{"loc": [text], "msg": text}])
        case "_missing" | "_is_about_output":  # these get what _clean() returns
            getattr(error_mapping, name)(error_mapping._clean(text))
        case "as_long_prompt":
            as_long_prompt(RequestRejectedError(error_mapping._clean(text)))
        case "_refused":
            error_mapping._refused(400, error_mapping._clean(text), text, text)
        case _:
            raise AssertionError(f"{name} needs a case here")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_work_on_hostile_messages_is_bounded(name: str) -> None:
    """60 times the message takes no more than 60 times as long, down to where a clock is too coarse to tell."""
    with untraced():
        slow = slowness()
        for seed in SEEDS:
            for prefix in PREFIXES:
                texts = [prefix + seed * (size // len(seed)) for size in (1000, 60_000)]
                assert bounded(name, texts, slow), (seed, prefix)


def bounded(name: str, texts: list[str], slow: float) -> bool:
    best = [math.inf, math.inf]
    for _ in range(TRIES):
        best = [min(before, seconds(name, text)) for before, text in zip(best, texts, strict=True)]
        short, long = best
        if long < 0.1 * slow and long < max(60 * short, 0.02 * slow):
            return True
    return False


def seconds(name: str, text: str) -> float:
    """Of CPU."""
    began = time.thread_time()
    call(name, text)
    return time.thread_time() - began


def test_work_does_not_grow_with_what_is_cut() -> None:
    """8 MiB is the largest event. The time that is left is that of orjson and of memcpy."""
    for seed in ("'loc': [", "/a", "x", '"', "["):
        event = b"data: " + (seed * (8 * 2**20 // len(seed))).encode() + b"\n\n"
        began = time.thread_time()
        stream_error(event)
        read_error(500, event)
        assert time.thread_time() - began < 0.1


@given(st.text(), st.text(), st.integers(100, 599))
def test_whatever_a_backend_says_there_is_a_verdict(message: str, param: str, status: int) -> None:
    for body in (
        orjson.dumps(error(message, param=param)), message.encode(), orjson.dumps({"detail": [message, param]}),
        orjson.dumps({"error": {"message": [[message]], "code": [param]}}),
    ):  # fmt: skip
        for verdict in (read_error(status, body), stream_error(b"data: " + body + b"\n\n")):
            assert isinstance(verdict, UpstreamError | RequestRejectedError)
            assert len(str(verdict)) < 1000


def test_deep_nesting_is_no_crash() -> None:
    for depth in (200, 900, 1020, 5000):
        for body in (b"[" * depth + b"]" * depth, b'{"error":' + b"[" * depth + b"]" * depth + b"}"):
            assert isinstance(read_error(500, body), UpstreamError)


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, {"detail": "Not Found"}), (405, {"detail": "Method Not Allowed"}),
     (404, error("File Not Found", code=404, type="not_found_error"))],
)  # fmt: skip
def test_a_missing_route_is_a_missing_capability(status: int, body: Any) -> None:
    verdict = read_error(status, orjson.dumps(body), "rerank")
    assert isinstance(verdict, MissingCapabilityError)
    assert verdict.capability == "rerank"
    assert not isinstance(read_error(status, orjson.dumps(body)), MissingCapabilityError)


def test_a_missing_model_is_no_missing_route() -> None:
    verdict = read_error(404, orjson.dumps(error("The model `x` does not exist.", code=404)), "rerank")
    assert isinstance(verdict, UnsupportedByBackendError)
    assert not isinstance(verdict, MissingCapabilityError)
