"""The fields that llama-cpp-python reads, with their types and ranges.

It answers 500 to a wrong type, and in a stream 200 with an empty body, since it reads some values only after the
headers are sent. So nothing reaches it unchecked, and fields that it would ignore are left out.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError, model_validator

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json

TokenId = Annotated[str, StringConstraints(pattern=r"^\d{1,7}$")]
MAX_MESSAGES = 2000  # more never fit into its context, and 8,000 take 0.1 s to check
MAX_KEY = 60  # characters of a key that the client chose, in a message
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class FunctionName(Strict):
    name: str


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool", "function"]
    content: str
    name: str = ""
    tool_call_id: str = ""
    tool_calls: Annotated[list[ToolCall], FailFast()] = []
    function_call: FunctionCall | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.role == "tool" and "tool_call_id" not in self.model_fields_set:
            raise ValueError("a tool message needs tool_call_id")
        if self.role == "function" and not self.name:
            raise ValueError("a function message needs name")
        return self


class Function(FunctionName):
    description: str = ""
    parameters: Json


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class JsonObject(Strict):
    type: Literal["text", "json_object"]
    schema_: Json = Field({}, alias="schema")


class Sampling(Strict):
    """The fields of both endpoints."""

    model: str
    stream: bool = False
    max_tokens: int = Field(16, ge=1, lt=2**31)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.95, ge=0, le=1)
    min_p: float = Field(0.05, ge=0, le=1)
    top_k: int = Field(40, ge=0, lt=2**31)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    repeat_penalty: float = Field(1, gt=0, le=100)
    logit_bias: dict[TokenId, Bias] = {}
    logit_bias_type: Literal["input_ids"] = "input_ids"
    seed: int = 0
    stop: str | list[str] = []
    mirostat_mode: int = Field(0, ge=0, le=2)
    mirostat_tau: float = Field(5, ge=0, le=10)
    mirostat_eta: float = Field(0.1, ge=0.001, le=1)


class Chat(Sampling):
    messages: Annotated[list[Message], FailFast(), Field(max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], FailFast()] = []
    tool_choice: ToolChoice | Literal["none", "auto", "required"] = "none"
    functions: Annotated[list[Function], FailFast()] = []
    function_call: FunctionName | Literal["none", "auto"] = "none"
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: JsonObject = JsonObject(type="text")


class Completion(Sampling):
    prompt: str = Field(min_length=1)
    echo: bool = False
    logprobs: int = Field(0, ge=0, le=20)


class Embedding(Strict):
    model: str
    input: str | list[str]


MODELS: dict[str, type[Strict]] = {"chat": Chat, "completions": Completion, "embeddings": Embedding}


def checked_fields(endpoint: str, body: Json) -> Json:
    """`body` without unknown fields. Raises BadRequestError, which names the first field that is wrong."""
    try:
        known = MODELS[endpoint].model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:MAX_KEY] for part in first["loc"])
        raise BadRequestError(f"{where}: {first['msg'].removeprefix('Value error, ')}", param=where or None) from None
    return known.model_dump(exclude_unset=True, by_alias=True)
