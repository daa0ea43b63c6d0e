"""Rebuilds a JSON schema from what llama-cpp-python can enforce, or refuses it.

Its converter writes a llama.cpp grammar from the schema, and a grammar that llama.cpp cannot parse kills the process
with every request in it. These were found to kill it: `\\d` in a pattern, a quote in an enum, an empty enum, anyOf or
type list, and a length limit of 2,000. Recursion, unknown types and `items: {}` make it silently accept any JSON. So
the schema is rebuilt here from the keywords that it is known to enforce.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from typing import Any

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
ANYTHING: Json = {"type": ["object", "array", "string", "number", "boolean", "null"]}
MAX_LENGTH = 1000  # items or characters; 2,000 kill it
MAX_NODES = 8000  # after references have been put in place; eight characters count as one
MAX_DEPTH = 80  # the same; each level takes up to five frames of Python's stack

# Keywords that do not change which values are valid; by default `format` is not a constraint.
ANNOTATIONS = frozenset({
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "discriminator",
    "examples", "format", "name", "nullable", "readOnly", "strict", "title", "writeOnly",
})  # fmt: skip
# Each of these constrains values of one type only.
TYPED = frozenset({
    "additionalProperties", "items", "maxItems", "maxLength", "minItems", "minLength", "prefixItems", "properties",
    "required",
})  # fmt: skip
PLAIN = re.compile(r"[ !#-\[\]-~\x80-\uffff]*")
FORMATS = ("date", "time", "date-time", "uuid")  # that it enforces


def enforceable(schema: Any, where: str) -> Json:
    """The schema in the converter's subset of the language, with references replaced by their targets.

    `where` is the request field, for the message. Raises BadRequestError.
    """
    return _Rebuilder(schema, where).rebuild(schema, ())


class _Rebuilder:
    def __init__(self, root: Any, where: str) -> None:
        self.root = root
        self.where = where
        self.nodes = 0
        self.depth = 0

    def refused(self, why: str) -> BadRequestError:
        return BadRequestError(f"this backend cannot enforce the JSON schema: {why}", param=self.where)

    def rebuild(self, schema: Any, path: tuple[str, ...]) -> Json:
        """`path`: the references being followed, to detect a circle."""
        self._count(1)
        if self.depth == MAX_DEPTH:
            raise self.refused(f"it is deeper than {MAX_DEPTH} levels, references included")
        self.depth += 1
        built = self._rebuilt(schema, path)
        self.depth -= 1
        return built

    def _count(self, nodes: int) -> None:
        """Also what is only copied or compared: a reference to a large object costs as much as the object."""
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.refused(f"it has more than {MAX_NODES} values, references included")

    def _rebuilt(self, schema: Any, path: tuple[str, ...]) -> Json:
        if schema is True or schema == {}:
            return ANYTHING
        if not isinstance(schema, dict):
            raise self.refused(f"{quoted(schema)} is not a schema")
        self._count(len(schema))
        for keyword, build in (("$ref", self._reference), ("allOf", self._all_of)):
            if keyword in schema:
                return build(schema, path)
        for keyword in ("anyOf", "oneOf", "const", "enum"):
            if keyword in schema:
                return self._choice(keyword, schema, path)
        return self._typed(schema, path)

    def _reference(self, schema: Json, path: tuple[str, ...]) -> Json:
        """The target replaces the reference; keywords beside `$ref` win."""
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise self.refused("only references within the schema ($ref: #/…) can be followed")
        if reference in path:
            raise self.refused(f"{quoted(reference)} refers to itself")
        target: Any = self.root
        for name in reference[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or name not in target:
                raise self.refused(f"{quoted(reference)} does not exist")
            target = target[name]
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        return self.rebuild({**target, **beside} if isinstance(target, dict) else target, (*path, reference))

    def _all_of(self, schema: Json, path: tuple[str, ...]) -> Json:
        parts = schema["allOf"]
        if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
            raise self.refused("allOf with other than one part")
        beside = {key: value for key, value in schema.items() if key != "allOf"}
        return self.rebuild({**parts[0], **beside}, path)

    def _choice(self, keyword: str, schema: Json, path: tuple[str, ...]) -> Json:
        self._only(schema, {keyword})
        if keyword == "const":
            return {"const": self._literal(schema["const"])}
        options = schema[keyword]
        if not isinstance(options, list) or not options:
            raise self.refused(f"{keyword} must be a list of at least one")
        if keyword == "enum":
            self._count(len(options))
            return {"enum": [self._literal(option) for option in options]}
        return {"anyOf": [self.rebuild(option, path) for option in options]}

    def _typed(self, schema: Json, path: tuple[str, ...]) -> Json:
        kind = schema.get("type", _implied_type(schema))
        if isinstance(kind, list) and kind:
            return {"anyOf": [self.rebuild({**schema, "type": each}, path) for each in kind]}
        if kind not in TYPES:
            raise self.refused(f"type {quoted(kind)} does not exist")
        builders: dict[str, Callable[[Json, tuple[str, ...]], Json]] = {
            "object": self._object, "array": self._array, "string": self._string,
        }  # fmt: skip
        build = builders.get(kind)
        if build is not None:
            return build(schema, path)
        self._only(schema, TYPED)
        return {"type": kind}

    def _object(self, schema: Json, path: tuple[str, ...]) -> Json:
        self._only(schema, TYPED)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise self.refused("properties must be an object and required a list")
        for name in required:
            if not isinstance(name, str) or name not in properties:
                raise self.refused(f"required names {quoted(name)}, which is not in properties")
        built: Json = {"type": "object"}
        if properties:
            built["properties"] = {self._name(name): self.rebuild(each, path) for name, each in properties.items()}
            built["required"] = required
            self._count(len(required))
        more = schema.get("additionalProperties")
        if more is False:
            built["additionalProperties"] = False
        elif more is not None and (properties or more is not True):
            built["additionalProperties"] = self.rebuild(more, path)
        return built

    def _array(self, schema: Json, path: tuple[str, ...]) -> Json:
        self._only(schema, TYPED)
        if "prefixItems" in schema:
            return self._tuple(schema, path)
        items = self.rebuild(schema.get("items", {}), path)
        return {"type": "array", "items": items, **self._bounds(schema, "minItems", "maxItems")}

    def _tuple(self, schema: Json, path: tuple[str, ...]) -> Json:
        """Exactly these items, as pydantic describes a tuple."""
        items = schema["prefixItems"]
        if not isinstance(items, list) or not items or schema.get("items", False) is not False:
            raise self.refused("prefixItems must be a list of at least one, without items")
        if {schema.get("minItems", len(items)), schema.get("maxItems", len(items))} != {len(items)}:
            raise self.refused("prefixItems with another minItems or maxItems than its length")
        return {"type": "array", "prefixItems": [self.rebuild(each, path) for each in items]}

    def _string(self, schema: Json, path: tuple[str, ...]) -> Json:
        self._only(schema, TYPED)
        bounds = self._bounds(schema, "minLength", "maxLength")
        kind = schema.get("format")
        return {"type": "string", "format": kind} if kind in FORMATS and not bounds else {"type": "string", **bounds}

    def _bounds(self, schema: Json, low: str, high: str) -> Json:
        bounds = {name: schema[name] for name in (low, high) if schema.get(name) is not None}
        for name, value in bounds.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LENGTH:
                raise self.refused(f"{name} must be a whole number up to {MAX_LENGTH}")
        if bounds.get(low, 0) > bounds.get(high, MAX_LENGTH):
            raise self.refused(f"{low} is more than {high}")
        return bounds

    def _literal(self, value: Any) -> Any:
        for text in _strings(value):
            self._count(len(text) // 8)
            if not _plain(text):
                raise self.refused("const and enum texts with quotes, backslashes, control characters or emoji")
        return value

    def _name(self, name: str) -> str:
        self._count(len(name) // 8)
        if not name or not _plain(name):
            raise self.refused("property names that are empty or have quotes, backslashes, control characters or emoji")
        return name

    def _only(self, schema: Json, known: Set[str]) -> None:
        for keyword in schema:
            if keyword != "type" and keyword not in known and keyword not in ANNOTATIONS:
                raise self.refused(f"the keyword {quoted(keyword)}")


def _implied_type(schema: Json) -> Any:
    if schema.keys() & {"properties", "additionalProperties", "required"}:
        return "object"
    if schema.keys() & {"items", "prefixItems"}:
        return "array"
    return "string" if schema.keys() & {"minLength", "maxLength"} else list(ANYTHING["type"])


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for each in [*value.keys(), *value.values()] for text in _strings(each)]
    return [text for each in value for text in _strings(each)] if isinstance(value, list) else []


def _plain(text: str) -> bool:
    """Whether its converter escapes the text rightly: it writes JSON's escapes into the grammar, where they differ."""
    return PLAIN.fullmatch(text) is not None
