"""The routes of other APIs, which become chats: OpenAI's Responses."""

from __future__ import annotations

from xgen_proxy.api.description.answer_schemas import ANYTHING, TEXT, WHOLE, fields, listed, maybe, named
from xgen_proxy.api.description.operation import ANY, BODY, EVENTS, JSON, KEY, Answer, Operation, Schema
from xgen_proxy.api.description.operations import ANSWER_HEADERS, ASKED, REQUEST_HEADERS
from xgen_proxy.api.description.request_schemas import CACHE_KEY, MODEL_FIELD, checked_fields, hints, nullable
from xgen_proxy.request.fields import INT32_MAX, MAX_LOGPROBS
from xgen_proxy.translation.responses.request import EFFORTS

NAMED_EVENTS: Schema = {"type": "string", "description": "Server-sent events: `event: NAME` and `data: {…}` each."}
TRANSLATED_HEADERS = (*ANSWER_HEADERS, "X-Dropped")
SAMPLING = ("temperature", "top_p")
TOOL: Schema = {"type": "object", "properties": {"name": TEXT, "type": TEXT}}


def responses_request() -> Schema:
    checked = checked_fields()
    limit = {"type": "integer", "minimum": 1, "maximum": INT32_MAX, "description": "The most tokens of the answer."}
    never = "Only false: the proxy keeps nothing."
    return {
        "type": "object",
        "properties": {
            "model": MODEL_FIELD,
            "input": {
                "description": "A text, or the items of the whole conversation.",
                "anyOf": [TEXT, {"type": "array", "items": ANYTHING, "minItems": 1}],
            },
            "instructions": nullable({"type": "string", "description": "The system message."}),
            "stream": nullable({"type": "boolean", "description": "Send the answer as server-sent events."}),
            "max_output_tokens": nullable(limit),
            **{name: checked[name] for name in SAMPLING},
            "top_logprobs": nullable({"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}),
            "tools": nullable({
                "type": "array", "items": TOOL,
                "description": "Functions and custom tools. Those that run at OpenAI are dropped: see X-Dropped.",
            }),
            "reasoning": maybe(fields({"effort": nullable({"type": "string", "enum": list(EFFORTS)})})),
            "text": maybe(fields({"format": maybe(ANYTHING)})),
            "store": nullable({"type": "boolean", "description": "true is dropped, and told in X-Dropped."}),
            "background": {"enum": [False, None], "description": never},
            "previous_response_id": {"type": "null", "description": "Send the whole conversation as `input`."},
            "prompt_cache_key": CACHE_KEY,
            **hints(),
        },
        "required": ["input"],
        "additionalProperties": True,
    }  # fmt: skip


def response_answer() -> Schema:
    return {
        **fields(
            id=TEXT, object={"const": "response"}, created_at=WHOLE, status=TEXT, model=TEXT, output=listed(ANYTHING),
            error=maybe(ANYTHING), incomplete_details=maybe(ANYTHING), usage=maybe(ANYTHING),
        ),
        "additionalProperties": True,
    }  # fmt: skip


def schemas() -> dict[str, Schema]:
    return {
        "ResponsesRequest": responses_request(),
        "Response": response_answer(),
    }


KEPT = "None is kept, so the answer is always 404: send the whole conversation as `input`."


OPERATIONS = (
    Operation(
        "POST", "/v1/responses", "createResponse", "Models", "OpenAI's Responses",
        "Becomes a chat, on every engine, and its answer a response. What no engine has is dropped, and named in"
        " X-Dropped. Nothing is kept.",
        {200: Answer("The response. With `stream`: OpenAI's events.", {
            JSON: named("Response"), EVENTS: NAMED_EVENTS
        }, TRANSLATED_HEADERS)},
        named("ResponsesRequest"), REQUEST_HEADERS, ASKED, needs_key=True, asks_a_model=True,
        example={"model": "smollm2", "input": "What is the capital of France?", "max_output_tokens": 64},
    ),
    Operation(
        "POST", "/v1/responses/input_tokens", "countResponseTokens", "Models", "Estimate the tokens of such a request",
        "The estimate that requests are routed by.",
        {200: Answer("The number.", {JSON: fields(object=TEXT, input_tokens=WHOLE)})},
        named("ResponsesRequest"), REQUEST_HEADERS, (*ANY, *KEY, *BODY, 404), needs_key=True,
        example={"model": "smollm2", "input": "What is the capital of France?"},
    ),
    *(
        Operation(
            method, f"/v1/responses/{{id}}{path}", name, "Models", summary, KEPT, {}, parameters=("id",),
            errors=(*ANY, *KEY, 404), needs_key=True,
        )
        for method, path, name, summary in (
            ("GET", "", "getResponse", "A response that was kept"),
            ("DELETE", "", "deleteResponse", "Delete a response that was kept"),
            ("POST", "/cancel", "cancelResponse", "Cancel a response in the background"),
        )
    ),
)  # fmt: skip
