"""The routes of other APIs, which become chats: Anthropic's Messages and OpenAI's Responses."""

from __future__ import annotations

from xgen_proxy.api.description.answer_schemas import ANYTHING, TEXT, WHOLE, fields, listed, maybe, named
from xgen_proxy.api.description.operation import ANY, BODY, EVENTS, JSON, KEY, Answer, Operation, Schema
from xgen_proxy.api.description.operations import ANSWER_HEADERS, ASKED, HELLO, REQUEST_HEADERS
from xgen_proxy.api.description.request_schemas import CACHE_KEY, MODEL_FIELD, checked_fields, hints, nullable
from xgen_proxy.request.fields import INT32_MAX, MAX_LOGPROBS
from xgen_proxy.translation.messages.request import EFFORTS as MESSAGES_EFFORTS
from xgen_proxy.translation.messages.request import THINKING
from xgen_proxy.translation.responses.request import EFFORTS

NAMED_EVENTS: Schema = {"type": "string", "description": "Server-sent events: `event: NAME` and `data: {…}` each."}
TRANSLATED_HEADERS = (*ANSWER_HEADERS, "X-Dropped")
SAMPLING = ("temperature", "top_p")
TOOL: Schema = {"type": "object"}  # what those have that are dropped is not looked at


def messages_request(*, counts: bool = False) -> Schema:
    """`counts`: of count_tokens, which needs no max_tokens."""
    text_or_blocks = {"anyOf": [TEXT, listed(ANYTHING)]}
    message = fields({"content": text_or_blocks}, role={"type": "string", "enum": ["user", "assistant", "system"]})
    choice = fields({"name": TEXT}, type={"type": "string", "enum": ["auto", "any", "tool", "none"]})
    output = {"effort": nullable({"type": "string", "enum": list(MESSAGES_EFFORTS)}), "format": maybe(ANYTHING)}
    limit = {"type": "integer", "minimum": 0, "maximum": INT32_MAX, "description": "The most tokens of the answer."}
    checked = checked_fields()
    return {
        "type": "object",
        "properties": {
            "model": MODEL_FIELD,
            "max_tokens": nullable(limit) if counts else limit,
            "messages": {"type": "array", "items": message, "minItems": 1},
            "system": {**text_or_blocks, "anyOf": [*text_or_blocks["anyOf"], {"type": "null"}]},
            "stream": nullable({"type": "boolean", "description": "Send the answer as server-sent events."}),
            "stop_sequences": nullable({"type": "array", "items": {"type": "string", "minLength": 1}}),
            **{name: checked[name] for name in (*SAMPLING, "top_k")},
            "tools": nullable({
                "type": "array", "items": TOOL,
                "description": "With `name` and `input_schema`. Anthropic's own are dropped, and told in X-Dropped.",
            }),
            "tool_choice": maybe(choice),
            "thinking": maybe(fields(type={"type": "string", "enum": list(THINKING)})),
            "output_config": maybe(fields(output)),
            "metadata": maybe(fields({"user_id": maybe(TEXT)})),
            **hints(),
        },
        "required": ["messages"] if counts else ["messages", "max_tokens"],
        "additionalProperties": True,
    }  # fmt: skip


def message_answer() -> Schema:
    usage = fields({"output_tokens_details": ANYTHING}, input_tokens=WHOLE, cache_creation_input_tokens=WHOLE,
                   cache_read_input_tokens=WHOLE, output_tokens=WHOLE)  # fmt: skip
    block = {**fields(type={"type": "string", "enum": ["text", "thinking", "tool_use"]}), "additionalProperties": True}
    return fields(
        id=TEXT, type=TEXT, role=TEXT, model=TEXT, content=listed(block), stop_reason=TEXT, stop_sequence=maybe(TEXT),
        usage=usage,
    )  # fmt: skip


def anthropic_error() -> Schema:
    return fields(type={"const": "error"}, error=fields(type=TEXT, message=TEXT), request_id=TEXT)


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
        "MessagesRequest": messages_request(),
        "CountRequest": messages_request(counts=True),
        "AnthropicMessage": message_answer(),
        "AnthropicError": anthropic_error(),
        "ResponsesRequest": responses_request(),
        "Response": response_answer(),
    }


KEPT = "None is kept, so the answer is always 404: send the whole conversation as `input`."


OPERATIONS = (
    Operation(
        "POST", "/v1/messages", "createMessage", "Models", "Anthropic's Messages",
        "Becomes a chat, on every engine, and its answer a message. What no engine has is dropped, and named in"
        " X-Dropped.",
        {200: Answer("The message. With `stream`: Anthropic's events.", {
            JSON: named("AnthropicMessage"), EVENTS: NAMED_EVENTS
        }, TRANSLATED_HEADERS)},
        named("MessagesRequest"), REQUEST_HEADERS, (*ASKED, 529), needs_key=True, asks_a_model=True,
        example={"model": "smollm2", "max_tokens": 64, "messages": HELLO}, error="AnthropicError",
    ),
    Operation(
        "POST", "/v1/messages/count_tokens", "countMessageTokens", "Models", "Count the tokens of such a request",
        "Exact where vLLM or llama-server is up, else an estimate. It takes no slot.",
        {200: Answer("The number.", {JSON: fields(input_tokens=WHOLE)}, ("Request-Id",))},
        named("CountRequest"), REQUEST_HEADERS, (*ANY, *KEY, *BODY, 404, 529), needs_key=True, asks_a_model=True,
        example={"model": "smollm2", "messages": HELLO}, error="AnthropicError",
    ),
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
