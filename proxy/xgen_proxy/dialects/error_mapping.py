"""Maps a backend's error to ours: the request is wrong, or this attempt failed and another backend may succeed.

Messages lose the server's file paths and echoes of the prompt. They may repeat what a client sent, of any length, so
they are cut before anything searches them, and no pattern scans further than a constant from where it starts.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.errors import (
    MissingCapabilityError,
    ProxyError,
    RequestRejectedError,
    UnsupportedByBackendError,
    UpstreamError,
    UpstreamOverloadedError,
    UpstreamProtocolError,
    UpstreamServerError,
)

PARSED = 64 * 1024  # bytes of a body or an event; what is longer is not parsed, but searched as text
SEARCHED = 4096  # characters
MAX_MESSAGE = 600
MAX_NAME = 100  # of a field, or of a code

TOO_LONG = re.compile(
    r"maximum context length|exceeds? (?:the )?(?:available )?context|longer than the maximum model length"
)
# vLLM's and llama-cpp-python's ways to say that the prompt fits and max_tokens does not; a code of
# context_length_exceeded would make agents drop their history: https://github.com/vllm-project/vllm/issues/42474
OUTPUT_TOO_LONG = re.compile(
    r"max_(?:completion_)?tokens'?(?:=\d{1,12})? (?:is too large|cannot be greater|must be less)"
)
REQUESTED = re.compile(
    r"maximum context length is (\d{1,9}) tokens.{1,40}requested \d{1,12} (?:output )?tokens"
    r"(?: \(| and your prompt contains (?:at least )?)(\d{1,9}) (?:in the|input)"
)
# vLLM 0.26 to 0.30 count a prompt up to `limit - requested + 1` only, and then say that, however long it is.
AT_LEAST = re.compile(
    r"maximum context length is (\d{1,9}) tokens.{1,40}requested (\d{1,9}) output tokens and your prompt contains"
    r" at least (\d{1,9}) input"
)
# vLLM 0.32, to a prompt that fills the context. A client's own limit below 1 is refused before.
NO_ROOM = re.compile(r"max_tokens must be at least 1, got (?:0|-\d{1,9})\b")
PATHS = re.compile(r"(?<!\w)(?:/[\w.@+-]{1,255}){2,64}(?::\d{1,9})?")
# pydantic's errors as text, with everything that was sent; this finds where and what of the first
INVALID = re.compile(r"""'loc': ([(\[][^)\]]{0,200}[)\]]|'[^']{0,200}'), 'msg': ("[^"]{0,600}"|'[^']{0,600}')""")
JINJA = "Jinja Exception: "  # llama-server's mark of what a chat template says to a conversation that it refuses
TEMPLATE = "the model's chat template refuses this conversation: "
# llama.cpp's servers answer 500 to some requests that are wrong; llama-cpp-python to what a template refuses, unmarked.
# "Failed to parse input at pos 31" is about what the model wrote: https://github.com/ggml-org/llama.cpp/issues/20532
CLIENTS_500 = re.compile(
    r"validation errors?|can only concatenate str|Input should be|[Ff]ailed to parse(?! input at)"
    r"|input is not supported|type must be|Unknown reasoning format|roles must alternate|[Rr]ole not supported"
    r"|roles are supported|[Ff]ailed to load image|" + re.escape(TEMPLATE)
)
OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")
PROMPTS = ("messages", "prompt")  # vLLM says input_tokens, which is not a field of a request

# FastAPI's words, llama-server's, and Go's
NO_ROUTE = frozenset({"Not Found", "File Not Found", "Method Not Allowed", "404 page not found"})
HOP_FAILED = frozenset({408, 425, 499})  # between us and the server: it says nothing about the client's request
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

NOT_ITS_MODEL = "its model, as it was started, does not read them"
# What engines say that were started without something: the whole sentence, so that no message that repeats a client's
# words can look like one. (sentence, capability, remedy)
MISSING: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(sentence), capability, remedy)
    for sentence, capability, remedy in (
        (
            r'"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set\.?',
            "tools",
            "start vLLM with --enable-auto-tool-choice and --tool-call-parser, or set the backend's tools = false",
        ),
        (
            r'`?tool_choice ?= ?["\']?\w{1,20}["\']?`? requires --tool-call-parser to be set\.?',
            "tools",
            "start vLLM with --tool-call-parser",
        ),
        (
            r"tools param requires --jinja flag",
            "tools",
            "start llama-server with --jinja, or set the backend's tools = false",
        ),
        (
            r"[\w./:@+…-]{1,200} is not a multimodal model(?: None)?\.?",
            "images",
            "its model takes no images: set the backend's images = false",
        ),
        (
            r"At most 0 image\(s\) may be provided in one (?:prompt|request)\.?.{0,200}",
            "images",
            "start vLLM with another --limit-mm-per-prompt, or set the backend's images = false",
        ),
        (r"At most 0 audio\(s\) may be provided in one (?:prompt|request)\.?.{0,200}", "audio", NOT_ITS_MODEL),
        (r"At most 0 video\(s\) may be provided in one (?:prompt|request)\.?.{0,200}", "video", NOT_ITS_MODEL),
        (
            r"image input is not supported\b.{0,200}",
            "images",
            "start llama-server with --mmproj, or set the backend's images = false",
        ),
        (r"audio input is not supported\b.{0,200}", "audio", NOT_ITS_MODEL),
        (r"video input is not supported\b.{0,200}", "video", NOT_ITS_MODEL),
        (
            r"This server does not support embeddings\. Start it with `?--embeddings?`?\.?",
            "embeddings",
            "start llama-server with --embeddings, or set the backend's embeddings = false",
        ),
        (
            r"(?:The|This) model does not support (?:the )?[Ee]mbeddings API\.?",
            "embeddings",
            "its model makes no embeddings: set the backend's embeddings = false",
        ),
        (
            r"Llama model must be created with embedding=True to call this method",
            "embeddings",
            "start llama-cpp-python with --embedding true, or set the backend's embeddings = false",
        ),
        (
            r"Pooling type 'none' is not OAI compatible\. .{0,200}",
            "embeddings",
            "start llama-server with another --pooling, or set the backend's embeddings = false",
        ),
        (
            r"This server does not support reranking\. Start it with `?--rerank(?:ing)?`?\.?",
            "rerank",
            "start llama-server with --reranking and a model made for it",
        ),
        (
            r"The current model does not support audio input\.?",
            "transcriptions",
            "start llama-server with a model that hears, and its --mmproj",
        ),
        (
            r"(?:The|This) model does not support (?:the )?(?:Rerank(?: \(Score\))?) API\.?",
            "rerank",
            "vLLM reranks with a model made for it",
        ),
        (
            r"(?:The|This) model does not support (?:the )?(?:Score|Scoring) API\.?",
            "score",
            "vLLM scores with a model made for it",
        ),
        (
            r"(?:The|This) model does not support (?:the )?Classification API\.?",
            "classify",
            "vLLM classifies with a model made for it",
        ),
        (
            r"(?:The|This) model does not support (?:the )?Transcriptions? API\.?",
            "transcriptions",
            "vLLM transcribes with a model made for speech",
        ),
        (
            r"(?:The|This) model does not support (?:the )?Translations? API\.?",
            "translations",
            "vLLM translates with a model made for speech",
        ),
        (
            r"logprobs is not supported for models created with logits_all=False",
            "logprobs",
            "start llama-cpp-python with --logits_all true",
        ),
        (
            r"This server does not support completions\. Start it without `?--embeddings?`?\.?",
            "generation",
            "it was started with --embeddings and answers nothing else: give it a model name of its own",
        ),
        (
            r"(?:The|This) model does not support (?:the )?(?:Chat )?Completions API\.?",
            "generation",
            "its model generates no text: give it a model name of its own",
        ),
    )
)


def read_error(status: int, body: bytes, route: str | None = None) -> ProxyError | UpstreamError:
    """The error for a response whose status is not 200. `route`: the capability that the path itself stands for."""
    message, code, param = _fields(body)
    if status in (429, 503):
        return UpstreamOverloadedError(f"says {status}", message)
    if status < 400:
        return UpstreamProtocolError(f"says {status}, which is no answer")
    if missing := _missing(message):
        return missing
    if status in (401, 403, 407):
        return UnsupportedByBackendError(f"says {status}: the backend's api_key setting is wrong")
    if route and status in (404, 405) and message in NO_ROUTE:
        return MissingCapabilityError(route, "it has no route for it")
    if status in (404, 405, 501):
        return UnsupportedByBackendError(f"says {status}: it has no such model or route", message)
    if status in HOP_FAILED or (status >= 500 and not CLIENTS_500.search(message)):
        return UpstreamServerError(f"says {status}", message)
    return _refused(status, message, code, param)


def stream_error(event: bytes) -> ProxyError | UpstreamError:
    """The error for an error event in a stream."""
    event = event[:PARSED]
    data = next(sse.payloads(event), b"") or event.partition(b":")[2].strip()
    message, code, param = _fields(data)
    status = code if isinstance(code, int) else 500
    if status in (429, 503):
        return UpstreamOverloadedError("says in the stream that it is busy", message)
    if missing := _missing(message):
        return missing
    if status >= 500 and not CLIENTS_500.search(message):
        return UpstreamServerError("says in the stream that it failed", message)
    return _refused(status, message, None, param)


def _missing(message: str) -> MissingCapabilityError | None:
    for sentence, capability, remedy in MISSING:
        if sentence.fullmatch(message):
            return MissingCapabilityError(capability, remedy)
    return None


def _refused(status: int, message: str, code: Any, param: str | None) -> RequestRejectedError:
    status = status if 400 <= status < 500 else 400
    code = code[:MAX_NAME] if isinstance(code, str) else None
    if NO_ROOM.search(message):
        status, code, param = 400, "context_length_exceeded", None
    elif param in OUTPUT_LIMITS or _is_about_output(message):
        param, code = param if param in OUTPUT_LIMITS else "max_tokens", None
    elif TOO_LONG.search(message):
        status, code = 400, "context_length_exceeded"
        param = param if param in PROMPTS else None
    return RequestRejectedError(message, status=status, type=TYPES.get(status), param=param, code=code)


def _is_about_output(message: str) -> bool:
    """Whether max_tokens is too large for the context, while the prompt fits."""
    if OUTPUT_TOO_LONG.search(message):
        return True
    numbers = REQUESTED.search(message)
    return numbers is not None and int(numbers[2]) < int(numbers[1])


def as_long_prompt(error: RequestRejectedError) -> RequestRejectedError:
    """The same as an error about the prompt, if it may be: a figure with "at least" does not tell a prompt that is too
    long from a max_tokens that is too large."""
    found = AT_LEAST.search(error.message)
    if found is None or int(found[3]) != int(found[1]) - int(found[2]) + 1:
        return error
    return RequestRejectedError(error.message, status=400, type=error.type, code="context_length_exceeded")


def _fields(body: bytes) -> tuple[str, Any, str | None]:
    """(message, code, param) from any shape that engines use: {error: {…}}, {error: "…"}, {detail: …}, plain text."""
    try:
        data = orjson.loads(body) if len(body) <= PARSED else None
    except orjson.JSONDecodeError:
        data = None
    if data is None:
        return _clean(body[:SEARCHED].decode("utf-8", "replace")), None, None
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return _clean(_as_text(error)), None, None
    message = error.get("message") or error.get("detail") or "no reason given"
    param = error.get("param")
    param = param[:MAX_NAME].removeprefix("body.") if isinstance(param, str) else None
    return _clean(_as_text(message)), error.get("code"), param


def _as_text(value: Any) -> str:
    """FastAPI's `detail` is a list of what is wrong; other shapes are as good as JSON."""
    if isinstance(value, str):
        return value
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and isinstance(first.get("loc"), list) and isinstance(first.get("msg"), str):
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int)).removeprefix("body.")
        return f"validation error: {where[:MAX_NAME]}: {first['msg']}"
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # nested too deeply
        return ""


def _clean(message: str) -> str:
    message = message[:SEARCHED]
    _, refused, sentence = message.partition(JINJA)
    invalid = INVALID.search(message)
    if refused:
        message = TEMPLATE + sentence.partition("\n")[0]
    elif invalid:
        where = ".".join(re.findall(r"[\w-]+", invalid[1])).removeprefix("body.")
        message = f"validation error: {where}: {invalid[2][1:-1]}"
    message = PATHS.sub("…", message).strip() or "no reason given"
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " …"
