"""Every route, described. A test compares this table with the routes of the app, both ways.

To add a route: its Operation here, or in a module beside this one whose table document.py adds.
"""

from __future__ import annotations

from xgen_proxy.api.description.answer_schemas import ANYTHING, TEXT, fields, listed, named
from xgen_proxy.api.description.operation import ANY, BODY, EVENTS, HTML, JSON, KEY, MODEL, PLAIN, Answer, Operation

HINT_HEADERS = ("X-Backend", "X-Urgency", "X-Task-Type", "X-Fallback", "X-Continuation", "X-Session-Id")
REQUEST_HEADERS = ("X-Request-Id", "traceparent", "tracestate", *HINT_HEADERS)
ANSWER_HEADERS = ("X-Backend", "X-Replica", "X-Route-Reason", "X-Attempts", "X-Overhead-Ms", "X-Model-Distance")
EVENT_TEXT = {"description": "Server-sent events: `data: {…}` and a blank line each."}  # 3.1 has no words for them
ASKED = (*ANY, *KEY, *BODY, *MODEL)  # whatever a request to a model may end with
TOKENS = '`{"token": "…"}` events, and `{"done": true}` at the end.'
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


def answered(description: str, schema: str, stream: str | None) -> dict[int, Answer]:
    """`stream`: what the events are; None if there is no stream."""
    content = {JSON: named(schema)} | ({EVENTS: EVENT_TEXT} if stream else {})
    return {200: Answer(f"{description} {stream}" if stream else description, content, ANSWER_HEADERS)}


INFERENCE = (
    Operation(
        "POST", "/v1/chat/completions", "createChatCompletion", "Models", "Answer a chat",
        "OpenAI's chat completions, streaming and not, with images and tools where a backend can. Fields that are not"
        " listed pass through to the backend.",
        answered("The answer.", "ChatCompletion", "With `stream`: chunks, and `data: [DONE]` at the end."),
        named("ChatRequest"), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example={"model": "smollm2", "messages": HELLO, "max_tokens": 64},
    ),
    Operation(
        "POST", "/v1/completions", "createCompletion", "Models", "Continue a text",
        "OpenAI's completions, streaming and not. Fields that are not listed pass through to the backend.",
        answered("The continuation.", "Completion", "With `stream`: chunks, and `data: [DONE]` at the end."),
        named("CompletionRequest"), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example={"model": "smollm2", "prompt": "One, two,", "max_tokens": 8},
    ),
    Operation(
        "POST", "/v1/embeddings", "createEmbeddings", "Models", "Turn texts into vectors",
        "OpenAI's embeddings, for backends that support them. Fields that are not listed, such as `encoding_format`,"
        " pass through to the backend.",
        answered("A vector for each text.", "Embeddings", None),
        named("EmbeddingsRequest"), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example={"input": ["one text", "another"]},
    ),
    Operation(
        "POST", "/generate", "generate", "Models", "A prompt in, a text out",
        "A minimal API on top of /v1/completions. Fields that are not listed are ignored.",
        answered("The text.", "Generated", f"With `stream`: {TOKENS}"),
        named("GenerateRequest"), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example={"prompt": "One, two,", "max_tokens": 8},
    ),
    Operation(
        "POST", "/generate/stream", "generateStream", "Models", "The same as a stream",
        "/generate with `stream: true`.",
        {200: Answer(TOKENS, {EVENTS: EVENT_TEXT}, ANSWER_HEADERS)},
        named("GenerateRequest"), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example={"prompt": "One, two,", "max_tokens": 8},
    ),
    Operation(
        "GET", "/v1/models", "listModels", "Models", "The public model names",
        "The default model first, if one is set. The context is the smallest of the backends that serve the model.",
        {200: Answer("The models.", {JSON: named("Models")})},
        errors=(*ANY, *KEY), needs_key=True,
    ),
    Operation(
        "GET", "/v1/models/{model}", "getModel", "Models", "One model",
        "A name may have slashes, as they are.",
        {200: Answer("The model.", {JSON: named("Model")})},
        parameters=("model",), errors=(*ANY, *KEY, 404), needs_key=True,
    ),
)  # fmt: skip

OPERATIONS_OF_THE_PROXY = (
    Operation(
        "POST", "/route", "explainRoute", "Operations", "The dry run",
        "How this request would be routed now, without sending it: the body is that of a chat, or with a `prompt` that"
        " of a completion.",
        {200: Answer("The candidates in order, each with its reason; those ruled out; or the error.", {
            JSON: named("Plan")
        })},
        {"anyOf": [named("ChatRequest"), named("CompletionRequest")]}, ("X-Request-Id", *HINT_HEADERS),
        (*ANY, *KEY, *BODY, 404), needs_key=True,
        example={"messages": HELLO, "urgency": "high"},
    ),
    Operation(
        "GET", "/models/status", "getFleet", "Operations", "The fleet",
        "State, load, memory and reason of each replica, as the last health check read them. Unknown is null.",
        {200: Answer("The backends and their replicas.", {JSON: named("Fleet")})},
    ),
    Operation(
        "GET", "/metrics", "getMetrics", "Operations", "Metrics", "In Prometheus's text format.",
        {200: Answer("The metrics.", {PLAIN: TEXT})},
    ),
    Operation(
        "GET", "/health", "getHealth", "Operations", "Whether the process is alive",
        "Says nothing about the backends: restarting the proxy would not repair them.",
        {200: Answer("It is.", {JSON: fields(status=TEXT)})},
    ),
    Operation(
        "GET", "/ready", "getReadiness", "Operations", "Whether a model can answer", "For load balancers.",
        {
            200: Answer("One can.", {JSON: fields(status=TEXT)}),
            503: Answer("No replica is up, or the proxy drains.", {
                JSON: {"anyOf": [fields(status=TEXT, reason=TEXT, replicas=ANYTHING), named("Error")]}
            }),
        },
    ),
    Operation(
        "GET", "/", "getRoot", "Operations", "Name, version and links", "For those who look whether a server is there.",
        {200: Answer("They are.", {JSON: fields(name=TEXT, version=TEXT, api=TEXT, links=listed(TEXT))})},
    ),
    Operation(
        "GET", "/openapi.json", "getOpenApi", "Operations", "This description",
        "For generators of clients. It is the same for every proxy of this version: it tells nothing about settings,"
        " backends or models, and needs no key.",
        {200: Answer("An OpenAPI 3.1 document.", {JSON: ANYTHING})},
    ),
    Operation(
        "GET", "/docs", "getDocs", "Operations", "This description as a page",
        "One HTML page without scripts or anything to load from elsewhere. It needs no key.",
        {200: Answer("The page.", {HTML: TEXT})},
    ),
)  # fmt: skip
