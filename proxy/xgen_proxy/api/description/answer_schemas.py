"""The schemas of answers: those of backends in OpenAI's shape, and the proxy's own."""

from __future__ import annotations

from typing import Any, get_type_hints

from pydantic import TypeAdapter

from xgen_proxy.api.description.operation import Schema
from xgen_proxy.dialects.backend_request import ModelFacts
from xgen_proxy.fleet.details.gpus import Gpu
from xgen_proxy.fleet.details.kv_cache import KvCache
from xgen_proxy.fleet.load import LoadParts
from xgen_proxy.fleet.memory.pressure import Pressure
from xgen_proxy.fleet.memory.process import Memory

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}


def maybe(schema: Schema) -> Schema:
    """Or null."""
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else {"anyOf": [schema, {"type": "null"}]}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def fields(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def of(kind: Any) -> Schema:
    """The schema of a dataclass or TypedDict, all of whose fields are sent."""
    return fields(**{name: TypeAdapter(each).json_schema() for name, each in get_type_hints(kind).items()})


def error() -> Schema:
    return fields(
        error=fields(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT)),
    )


USAGE = fields(
    {"completion_tokens": WHOLE, "total_tokens": WHOLE, "prompt_tokens_details": maybe(ANYTHING)}, prompt_tokens=WHOLE
)


def chat_completion() -> Schema:
    choice = fields(
        {"logprobs": maybe(ANYTHING)},
        index=WHOLE,
        message=fields({"content": maybe(TEXT), "tool_calls": maybe(listed(ANYTHING))}, role=TEXT),
        finish_reason=maybe(TEXT),
    )
    return fields({"usage": maybe(USAGE)}, id=TEXT, object=TEXT, created=WHOLE, model=TEXT, choices=listed(choice))


def completion() -> Schema:
    choice = fields({"logprobs": maybe(ANYTHING)}, index=WHOLE, text=TEXT, finish_reason=maybe(TEXT))
    return fields({"usage": maybe(USAGE)}, id=TEXT, object=TEXT, created=WHOLE, model=TEXT, choices=listed(choice))


def embeddings() -> Schema:
    vector = {"anyOf": [listed(NUMBER), TEXT], "description": "Numbers, or base64 of 32-bit floats."}
    item = fields({"object": TEXT}, index=WHOLE, embedding=vector)
    return fields({"usage": maybe(USAGE)}, object=TEXT, model=TEXT, data=listed(item))


def generated() -> Schema:
    return fields(text=TEXT, backend_used=TEXT, generation_time=NUMBER, tokens_per_second=maybe(NUMBER))


def model() -> Schema:
    optional = {"max_model_len": WHOLE, "context_length": WHOLE, "alias_of": TEXT}
    return fields(
        optional, id=TEXT, object=TEXT, created=WHOLE, owned_by=TEXT, backends=listed(TEXT), capabilities=listed(TEXT)
    )


def plan() -> Schema:
    candidate = fields(
        {"model_distance": TEXT},
        backend=TEXT, replica=TEXT, device_class=TEXT, load=NUMBER, tier=WHOLE, memory=maybe(TEXT), reason=TEXT,
    )  # fmt: skip
    alias = fields(asked=TEXT, pattern=TEXT, route=maybe(TEXT))
    features = fields(
        endpoint=TEXT, model=maybe(TEXT), alias=maybe(alias), prompt_words=WHOLE, prompt_tokens_estimate=WHOLE,
        max_tokens=maybe(WHOLE), max_tokens_believed=FLAG,
        stream=FLAG, needs=listed(TEXT), backend=TEXT, urgency=TEXT, task_type=maybe(TEXT), fallback=FLAG,
    )  # fmt: skip
    error = fields(status=WHOLE, message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT))
    return fields(
        candidates=listed(candidate),
        rejections=listed(fields(name=TEXT, reason=TEXT)),
        error=maybe(error),
        features=features,
    )


def fleet() -> Schema:
    memory = of(Memory)
    memory["properties"] |= {"kv_usage": maybe(NUMBER), "pressure": maybe(of(Pressure))}
    memory["required"] = list(memory["properties"])
    replica = fields(
        name=TEXT, url=TEXT, state=TEXT, reason=TEXT, for_s=NUMBER, up=FLAG, in_flight=WHOLE, slots=WHOLE,
        connections=WHOLE, load=of(LoadParts), memory=memory, kv_cache=maybe(of(KvCache)), model=maybe(of(ModelFacts)),
    )  # fmt: skip
    backend = fields(
        name=TEXT, device_class=TEXT, dialect=TEXT, models={"type": "object", "additionalProperties": TEXT},
        context=maybe(WHOLE), capabilities=listed(TEXT), replicas=listed(replica),
    )  # fmt: skip
    alias = fields(model=TEXT, route=maybe(TEXT), urgency=maybe(TEXT), served=FLAG)
    by_pattern: Schema = {"type": "object", "additionalProperties": alias}
    pair = fields(model=TEXT, backends=listed(TEXT), same_tokenizer=maybe(FLAG), top1=maybe(NUMBER))
    return fields(
        default_model=maybe(TEXT), models=listed(TEXT), aliases=by_pattern, queued=WHOLE, draining=FLAG,
        gpus=maybe(listed(of(Gpu))), model_pairs=listed(pair), backends=listed(backend),
    )  # fmt: skip


def schemas() -> dict[str, Schema]:
    """The components that operations refer to."""
    return {
        "Error": error(),
        "ChatCompletion": chat_completion(),
        "Completion": completion(),
        "Embeddings": embeddings(),
        "Generated": generated(),
        "Model": model(),
        "Models": fields(object=TEXT, data=listed(named("Model"))),
        "Plan": plan(),
        "Fleet": fleet(),
    }
