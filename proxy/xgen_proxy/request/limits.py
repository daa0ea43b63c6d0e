"""How large and how deep a request may be.

A hostile body costs the engines far more than it costs to send: an enum of 20,000 values in a JSON schema blocks
llama-server for minutes, 50,000 keys cost it 20 s, and a schema that refers to itself without end makes vLLM answer
500.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import NoDecode

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json
from xgen_proxy.request.media.origins import read_origins


class Limits(BaseModel, extra="forbid"):
    """What a client may send. Over it: 400, 408 or 413. The reasons are hostile requests that were tried."""

    body_bytes: int = Field(10 * 1024 * 1024, ge=1024, description="Request body. nginx's limit is the same.")
    upload_bytes: int = Field(
        26 * 1024 * 1024,
        ge=1024,
        description="A form with audio: OpenAI and vLLM take 25 MiB of it. nginx's limit is the same.",
    )
    body_timeout_s: float = Field(30.0, gt=0, description="For the whole body to arrive; backends wait for ever.")
    messages: int = Field(10_000, ge=1, description="Messages, and parts; 100,000 kept llama-server busy for a minute.")
    json_depth: int = Field(64, ge=4, le=200, description="Nesting of the request body; JSON is written to 254 levels.")
    json_nodes: int = Field(150_000, ge=100, description="Values in the request body; 50,000 keys cost 20 s.")
    schema_nodes: int = Field(2_000, ge=10, description="Values in a request's JSON schemas; 20,000 block for minutes.")
    images: int = Field(100, ge=0, description="Images in a request, as in Anthropic's API.")
    image_pixels: int = Field(
        256_000_000,
        ge=1,
        description="Pixels of all images of a request together: 120 screenshots. An engine takes 3 bytes for each.",
    )
    media_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(read_origins)] = Field(
        default=(),
        description="Where images and other media may be fetched from by an engine, comma-separated:"
        " https://HOST, http://HOST:PORT, or https://*.DOMAIN for all names under it. Empty: only data URLs are taken.",
    )
    queue: int = Field(512, ge=0, description="Requests that may wait for a slot.")
    queue_timeout_s: float = Field(60.0, gt=0, description="Longest wait for a slot; then 429.")


SCHEMA_FIELDS = (
    "response_format", "tools", "functions",  # OpenAI's
    "structured_outputs", "guided_json", "guided_choice", "guided_regex", "guided_grammar",  # vLLM's
    "json_schema", "grammar",  # llama-server's
)  # fmt: skip
SHORT_TEXT = 100  # characters: a name or a value rather than a grammar
HOLDERS = ("schema", "parameters", "json")  # of a schema, in response_format, tools and structured_outputs
COMBINATIONS = ("allOf", "anyOf", "oneOf")
SCHEMA_NAMES = frozenset(SCHEMA_FIELDS)


def measure(value: Any, max_depth: int, max_nodes: int) -> tuple[int, int]:
    """(values, levels). Stops counting past either limit. Iterative, so that depth costs no stack."""
    nodes = 0
    depth = 0
    level = [value]
    while level and depth <= max_depth and nodes <= max_nodes:
        depth += 1
        nodes += len(level)
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
        level = below
    return nodes, depth


def check_schemas(body: Json, limits: Limits) -> None:
    """Raises BadRequestError."""
    left = limits.schema_nodes
    for name, schema in schemas(body):
        nodes, _ = measure(schema, limits.json_depth, left)
        left -= nodes if nodes > left else nodes + _written(schema)
        if left < 0:
            raise BadRequestError(
                f"the schema in {name}, with those before it, has more than {limits.schema_nodes} values, this server's"
                " limits.schema_nodes (a long text counts as one for each 8 characters)",
                param=name,
            )
        if refers_to_itself(schema):
            raise BadRequestError(
                f"the schema in {name} refers to itself without end; break the $ref circle", param=name
            )


def schemas(body: Json) -> list[tuple[str, Any]]:
    """(field, schema) of everything that an engine would turn into a grammar."""
    if SCHEMA_NAMES.isdisjoint(body):  # as in most requests; this runs for all
        return []
    return [(name, body[name]) for name in SCHEMA_FIELDS if body.get(name)]


def _written(schema: Any) -> int:
    """Values that the texts of a schema amount to, beyond the first of each: eight characters are about one alternative
    of a grammar, one step of a pattern. Descriptions are not compiled."""
    count = 0
    level = [schema]
    while level:
        each = level.pop()
        if isinstance(each, str):
            count += max(0, len(each) - SHORT_TEXT) // 8
        elif isinstance(each, dict):
            level.extend(each)
            level.extend(value for key, value in each.items() if key != "description" or not isinstance(value, str))
        elif isinstance(each, list):
            level.extend(each)
    return count


def refers_to_itself(schema: Any) -> bool:
    """Whether a `$ref` leads back to itself through nothing but `$ref`s and combinations. A recursive tree is fine."""
    return any(_circles(root) for root in _roots(schema))


def _roots(value: Any) -> list[Json]:
    """The objects that `#/…` can refer to: those with definitions, and those where a request has a schema."""
    roots: list[Json] = [value] if isinstance(value, dict) else []
    level = [value]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            if "$defs" in each or "definitions" in each:
                roots.append(each)
            roots.extend(_as_dict(each[holder]) for holder in HOLDERS if holder in each)
            level.extend(each.values())
        elif isinstance(each, list):
            level.extend(each)
    return roots


def _circles(root: Json) -> bool:
    """Walks from each definition along its references; no definition twice."""
    definitions = {"#": root, **_as_dict(root.get("definitions")), **_as_dict(root.get("$defs"))}
    done: set[str] = set()
    for start in definitions:
        path = {start: _targets(definitions[start])} if start not in done else {}
        while path:
            name = next(reversed(path))
            target = next((each for each in path[name] if each in definitions and each not in done), None)
            if target is None:
                done.add(name)
                del path[name]
            elif target in path:
                return True
            else:
                path[target] = _targets(definitions[target])
    return False


def _targets(schema: Any) -> Iterator[str]:
    """The last names of the references that must be followed before anything else of a value is known."""
    level = [schema]
    while level:
        each = _as_dict(level.pop())
        reference = each.get("$ref")
        if isinstance(reference, str):
            yield reference.rpartition("/")[2]
        for keyword in COMBINATIONS:
            parts = each.get(keyword)
            level.extend(parts if isinstance(parts, list) else ())


def _as_dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}
