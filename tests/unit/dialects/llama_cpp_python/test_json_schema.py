"""Which JSON schemas llama-cpp-python gets, and in which form."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from xgen_proxy.dialects.llama_cpp_python.json_schema import ANYTHING, TYPES, enforceable
from xgen_proxy.errors import BadRequestError

S: dict[str, Any] = {"type": "string"}

SAME: dict[str, Any] = {
    "each type": {"anyOf": [{"type": kind} for kind in TYPES if kind != "array"]},
    "object": {"type": "object", "properties": {"a": S, "é_1": S}, "required": ["a"]},
    "closed": {"type": "object", "properties": {"a": S}, "required": [], "additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "list": {"type": "array", "items": S, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [S, {"type": "null"}]},
    "lengths": {"type": "string", "minLength": 1, "maxLength": 1000},
    "date": {"type": "string", "format": "date"},
    "enum": {"enum": ["a", 1, None, {"b": [True]}, "한국"]},
    "const": {"const": "x"},
}


@pytest.mark.parametrize("schema", SAME.values(), ids=SAME)
def test_an_enforceable_schema_is_unchanged(schema: Any) -> None:
    assert enforceable(schema, "tools") == schema


REBUILT: dict[str, tuple[Any, Any]] = {
    "notes": ({**S, "title": "t", "description": 'a "b"', "default": 3, "$schema": "x"}, S),
    "oneOf": ({"oneOf": [S, {"type": "null"}]}, {"anyOf": [S, {"type": "null"}]}),
    "type list": (
        {"type": ["object", "null"], "properties": {"a": S}},
        {"anyOf": [{"type": "object", "properties": {"a": S}, "required": []}, {"type": "null"}]},
    ),
    "type list with bounds": (
        {"type": ["string", "null"], "maxLength": 5},
        {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
    ),
    "anything": ({}, ANYTHING),
    "true": (True, ANYTHING),
    "items of any kind": ({"type": "array"}, {"type": "array", "items": ANYTHING}),
    "no properties": ({"type": "object", "properties": {}, "additionalProperties": True}, {"type": "object"}),
    "object by its keywords": ({"properties": {"a": S}}, {"type": "object", "properties": {"a": S}, "required": []}),
    "array by its keywords": ({"items": S}, {"type": "array", "items": S}),
    "string by its keywords": ({"maxLength": 2}, {"type": "string", "maxLength": 2}),
    "unknown format": ({"type": "string", "format": "email"}, S),
    "enum with a type": ({"type": "string", "enum": ["a"]}, {"enum": ["a"]}),
    "reference": ({"$ref": "#/$defs/a", "$defs": {"a": S}}, S),
    "reference with escapes": ({"$ref": "#/$defs/a~1b~0", "$defs": {"a/b~": S}}, S),
    "reference, twice": (
        {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": S}},
        {"anyOf": [S, S]},
    ),
    "beside a reference": (
        {"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": S}},
        {"type": "string", "maxLength": 2},
    ),
    "allOf of one": ({"allOf": [S], "maxLength": 2}, {"type": "string", "maxLength": 2}),
    "pair": ({"prefixItems": [S, S], "minItems": 2, "maxItems": 2}, {"type": "array", "prefixItems": [S, S]}),
    "open object": (
        {"type": "object", "properties": {"a": S}, "additionalProperties": True},
        {"type": "object", "properties": {"a": S}, "required": [], "additionalProperties": ANYTHING},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "rebuilt"), REBUILT.values(), ids=REBUILT)
def test_a_schema_is_rebuilt_in_the_converters_subset(schema: Any, rebuilt: Any) -> None:
    assert enforceable(schema, "tools") == rebuilt


NOT: dict[str, tuple[Any, str]] = {
    "a number": (5, "not a schema"),
    "false": (False, "not a schema"),
    "null": (None, "not a schema"),
    "a pattern": ({"type": "string", "pattern": "^a$"}, "pattern"),
    "a range": ({"type": "number", "minimum": 0}, "minimum"),
    "not": ({"not": S}, "not"),
    "oneOf beside properties": ({"oneOf": [S], "properties": {}}, "properties"),
    "several in allOf": ({"allOf": [S, S]}, "allOf"),
    "an empty enum": ({"enum": []}, "enum"),
    "anyOf of no list": ({"anyOf": {}}, "anyOf"),
    "an unknown type": ({"type": "banana"}, "banana"),
    "an empty type list": ({"type": []}, "type"),
    "properties of no object": ({"properties": []}, "properties"),
    "required of no list": ({"properties": {"a": S}, "required": "a"}, "required"),
    "required and unknown": ({"properties": {"a": S}, "required": ["b"]}, "required"),
    "an empty name": ({"properties": {"": S}}, "names"),
    "a quote in a name": ({"properties": {'"': S}}, "names"),
    "a quote in an enum": ({"enum": ['"']}, "quotes"),
    "a quote within a const": ({"const": {"a": ['"']}}, "quotes"),
    "a control character": ({"const": "\x07"}, "control"),
    "an emoji": ({"const": "😀"}, "emoji"),
    "too long": ({"type": "string", "maxLength": 1001}, "maxLength"),
    "a negative bound": ({"type": "array", "minItems": -1}, "minItems"),
    "a bound that is no number": ({"type": "array", "minItems": True}, "minItems"),
    "bounds crossed": ({"type": "string", "minLength": 2, "maxLength": 1}, "minLength"),
    "an empty tuple": ({"prefixItems": []}, "prefixItems"),
    "a tuple with more": ({"prefixItems": [S], "items": S}, "prefixItems"),
    "a tuple of another length": ({"prefixItems": [S], "maxItems": 2}, "prefixItems"),
    "a dangling reference": ({"$ref": "#/$defs/a"}, "does not exist"),
    "a reference elsewhere": ({"$ref": "https://a"}, "references"),
    "a reference to itself": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself"),
    "recursion": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
        "itself",
    ),
    "a bomb": (
        {
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 10} for n in range(9)},
                "9": S,
            },
        },
        "more than",
    ),
}


@pytest.mark.parametrize(("schema", "word"), NOT.values(), ids=NOT)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: Any, word: str) -> None:
    with pytest.raises(BadRequestError, match=word) as refused:
        enforceable(schema, "response_format")
    assert refused.value.param == "response_format"


class Leaf(BaseModel):
    name: str
    size: int | None = None


class Tree(BaseModel):
    leaves: list[Leaf]
    by_name: dict[str, Leaf]
    pair: tuple[int, Leaf]


def test_the_schema_of_a_pydantic_model_is_enforceable() -> None:
    built = enforceable(Tree.model_json_schema(), "response_format")
    leaf = {
        "type": "object",
        "properties": {"name": S, "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        "required": ["name"],
    }
    assert built["properties"]["leaves"] == {"type": "array", "items": leaf}
    assert built["properties"]["by_name"] == {"type": "object", "additionalProperties": leaf}
    assert built["properties"]["pair"] == {"type": "array", "prefixItems": [{"type": "integer"}, leaf]}


KEYWORDS = ["type", "properties", "items", "enum", "anyOf", "$ref", "required", "minItems", "const", "allOf", "a"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([*TYPES, "", '"', "#/properties/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=3),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_rebuilt_or_refused(schema: Any) -> None:
    try:
        built = enforceable(schema, "tools")
    except BadRequestError:
        return
    Draft202012Validator.check_schema(built)
    enforceable(built, "tools")  # the subset contains its own schemas


NAMES = st.sampled_from(["a", "b", "é_1", "한국"])
LEAVES = st.one_of(
    st.sampled_from([{"type": kind} for kind in TYPES if kind not in ("array", "string")]),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(NAMES | st.integers() | st.none(), min_size=1, max_size=3)),
)


def composites(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def make_object(properties: dict[str, Any], closed: bool) -> dict[str, Any]:
        schema = {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
        return {**schema, "additionalProperties": False} if closed else schema

    return st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 9)),
        st.builds(lambda items: {"type": "array", "prefixItems": items}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(make_object, st.dictionaries(NAMES, inner, min_size=1, max_size=3), st.booleans()),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {**{f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(900)}, "d900": {}}, "$ref": "#/$defs/d0"},
        {"$defs": {"a": {"enum": ["x"] * 900}}, "anyOf": [{"$ref": "#/$defs/a"}] * 900},
        {"$defs": {"a": {"enum": ["x" * 8000]}}, "anyOf": [{"$ref": "#/$defs/a"}] * 900},
        {"$defs": {"a": {"properties": {"p": {}}, "required": ["p"] * 900}}, "anyOf": [{"$ref": "#/$defs/a"}] * 900},
        {"$defs": {"a": {"title": "t", **{f"$comment{n}": n for n in range(900)}}},
         "anyOf": [{"$ref": "#/$defs/a"}] * 900},
    ],
)  # fmt: skip
def test_references_do_not_multiply_a_schema(schema: Any) -> None:
    with pytest.raises(BadRequestError, match="cannot enforce the JSON schema"):
        enforceable(schema, "tools")


@pytest.mark.parametrize(
    "schema", [{"$ref": "#/" + "x" * 9000}, {"type": "x" * 9000}, {"required": ["x" * 9000]}, {"x" * 9000: 1}]
)
def test_messages_quote_the_schema_in_brief(schema: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        enforceable(schema, "tools")
    assert len(caught.value.message) < 200


SUBSET = st.recursive(LEAVES, composites, max_leaves=8)
INSTANCES = st.recursive(
    st.none() | st.booleans() | st.integers() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(SUBSET)
def test_a_schema_of_the_subset_is_a_fixed_point(schema: Any) -> None:
    assert enforceable(schema, "tools") == schema


@given(SUBSET, st.lists(INSTANCES, min_size=1, max_size=5))
def test_a_rebuilt_schema_accepts_the_same_values(schema: Any, values: list[Any]) -> None:
    """References, annotations and wrappers are put around the schema, and must come off without a change of meaning."""
    wrapped = {"$defs": {"x": {"title": "t", "allOf": [schema]}}, "$ref": "#/$defs/x", "description": "d"}
    built = Draft202012Validator(enforceable(wrapped, "tools"))
    original = Draft202012Validator(wrapped)
    for value in values:
        assert built.is_valid(value) == original.is_valid(value)
