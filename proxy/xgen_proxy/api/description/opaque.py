"""The routes that pass unread, by their model."""

from __future__ import annotations

from xgen_proxy.api.description.answer_schemas import ANYTHING, TEXT
from xgen_proxy.api.description.operation import EVENTS, JSON, PLAIN, Answer, Operation, Schema
from xgen_proxy.api.description.operations import ANSWER_HEADERS, ASKED, EVENT_TEXT, REQUEST_HEADERS
from xgen_proxy.api.description.request_schemas import MODEL_FIELD, hints
from xgen_proxy.request.features import Endpoint
from xgen_proxy.request.fields import MAX_INPUTS
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.request.parsing import OTHER_HINTS

FORM = "multipart/form-data"
WORDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "rerank": (
        "rerank",
        "How relevant documents are to a query",
        {"query": "Paris", "documents": ["a city"]},
    ),
    "score": ("score", "How alike two texts are", {"text_1": "a city", "text_2": "a town"}),
    "classify": ("classify", "Which class a text is of", {"input": "a fine day"}),
    "tokenize": ("tokenize", "The tokens of a text", {"prompt": "One, two"}),
    "detokenize": ("detokenize", "The text of tokens", {"tokens": [1, 2, 3]}),
    "transcriptions": ("transcribe", "Speech as text", {"model": "whisper", "file": "@speech.wav"}),
    "translations": ("translateSpeech", "Speech as English text", {"model": "whisper", "file": "@speech.wav"}),
}
UNREAD = (
    "Passed to a backend that has the route, and so is its answer; the proxy reads the model and the hints. Where no"
    " backend of the model has it, the answer is a 400 that names the model."
)


def body(endpoint: Endpoint) -> Schema:
    """What the proxy reads of it; the rest is for the engine."""
    texts = {name: {"description": f"A text or a list of at most {MAX_INPUTS:,}."} for name in OPAQUE[endpoint].texts}
    if OPAQUE[endpoint].chat:
        texts["messages"] = {"description": "A chat, which is one text."}
    return {
        "type": "object",
        "properties": {"model": MODEL_FIELD, **texts, **hints(OTHER_HINTS)},
        "additionalProperties": True,
    }


def form() -> Schema:
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": "The audio."}
    return {
        "type": "object",
        "properties": {"model": TEXT, "file": file, "stream": TEXT},
        "required": ["file"],
        "additionalProperties": True,
    }


def operation(endpoint: Endpoint) -> Operation:
    name, summary, example = WORDS[endpoint]
    is_form = OPAQUE[endpoint].form
    content = {JSON: ANYTHING, EVENTS: EVENT_TEXT, PLAIN: TEXT} if is_form else {JSON: ANYTHING}
    return Operation(
        "POST", OPAQUE[endpoint].path, name, "Models", summary, UNREAD,
        {200: Answer("The engine's answer.", content, ANSWER_HEADERS)},
        form() if is_form else body(endpoint), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example=example, body_type=FORM if is_form else JSON,
    )  # fmt: skip


OPERATIONS = tuple(operation(endpoint) for endpoint in OPAQUE)
