from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.json_body import read_json
from xgen_proxy.request.limits import Limits, check_schemas, measure, refers_to_itself, schemas
from xgen_proxy.translation.messages.api import MessagesApi
from xgen_proxy.translation.responses.api import ResponsesApi
from xgen_proxy.translation.translation import Api

JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def count(value: Any) -> tuple[int, int]:
    """(values, levels), recursively."""
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    below = [count(child) for child in children]
    return 1 + sum(nodes for nodes, _ in below), 1 + max((depth for _, depth in below), default=0)


@given(JSON)
def test_measure_counts_values_and_levels(value: Any) -> None:
    assert measure(value, 10**6, 10**6) == count(value)


@pytest.mark.parametrize(
    ("api", "field", "inside"),
    [
        (ResponsesApi(), "text", '{"format":{"type":"json_schema","schema":{"a":%b}}}'),
        (ResponsesApi(), "tools", '[{"type":"function","name":"f","parameters":{"a":%b}}]'),
        (MessagesApi(lambda: True), "tools", '[{"name":"f","input_schema":{"a":%b}}]'),
    ],
)
def test_the_deepest_request_can_be_written(api: Api, field: str, inside: str) -> None:
    limits = Limits(json_depth=200)
    depth = 199 - inside.count("[") - inside.count("{")
    value = inside.replace("%b", "[" * depth + "]" * depth)
    raw = f'{{"input":"Hi","max_tokens":5,"messages":[{{"role":"user","content":"Hi"}}],"{field}":{value}}}'
    assert orjson.dumps(api.translate(read_json(raw.encode(), {b"content-type": b"application/json"}, limits)).body)
    with pytest.raises(ValidationError):
        Limits(json_depth=201)


def test_measure_stops_past_a_limit() -> None:
    assert measure(nested(10**5), 64, 10**6)[1] == 65
    assert measure([[0] * 10**5] * 3, 64, 1000)[0] < 10**6


@pytest.mark.parametrize("field", ["response_format", "tools", "json_schema", "structured_outputs"])
def test_a_large_schema_is_refused(field: str) -> None:
    with pytest.raises(BadRequestError, match="more than 100 values") as caught:
        check_schemas({field: {"enum": list(range(200))}}, Limits(schema_nodes=100))
    assert caught.value.param == field
    check_schemas({"metadata": {"enum": list(range(200))}}, Limits(schema_nodes=100))


def test_a_long_grammar_counts_as_values() -> None:
    with pytest.raises(BadRequestError, match="the schema in grammar"):
        check_schemas({"grammar": "a" * 900}, Limits(schema_nodes=100))


def test_a_long_text_in_a_schema_counts_as_values() -> None:
    long = "x" * 900
    schemas_of_it: list[Any] = [{"pattern": long}, {"enum": [long]}, {"properties": {long: {}}}, {"$ref": long}]
    for schema in schemas_of_it:
        with pytest.raises(BadRequestError, match="more than 100 values"):
            check_schemas({"json_schema": schema}, Limits(schema_nodes=100))
    check_schemas({"tools": [{"description": long}]}, Limits(schema_nodes=100))
    with pytest.raises(BadRequestError, match="more than 100 values"):
        check_schemas({"json_schema": {"description": {"pattern": long}}}, Limits(schema_nodes=100))


def test_the_schemas_of_a_request_count_together() -> None:
    half = {"enum": ["a"] * 60}
    check_schemas({"json_schema": half}, Limits(schema_nodes=100))
    with pytest.raises(BadRequestError, match="more than 100 values"):
        check_schemas({"json_schema": half, "tools": [half]}, Limits(schema_nodes=100))


def test_schemas_finds_every_field_that_becomes_a_grammar() -> None:
    body = {"tools": [1], "json_schema": {"a": 1}, "grammar": "", "messages": []}
    assert schemas(body) == [("tools", [1]), ("json_schema", {"a": 1})]
    assert schemas({"messages": []}) == []


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"definitions": {"a": {"$ref": "#/definitions/b"}, "b": {"$ref": "#/definitions/a"}}},
        {"properties": {"x": {"$defs": {"a": {"$ref": "#/$defs/a"}}}}},
        {"allOf": [{"$ref": "#"}]},
        {"schema": {"$ref": "#"}},
        {
            "$defs": {"a": {"anyOf": [{"type": "null"}, {"oneOf": [{"$ref": "#/$defs/b"}]}]}, "b": {"$ref": "#"}},
            "$ref": "#/$defs/a",
        },
    ],
)
def test_a_circle_of_references_is_refused(schema: dict[str, Any]) -> None:
    assert refers_to_itself(schema)
    with pytest.raises(BadRequestError, match="refers to itself without end"):
        check_schemas({"json_schema": schema}, Limits())


def test_a_recursive_type_is_accepted() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}
    assert not refers_to_itself({"$defs": {"tree": tree}, "$ref": "#/$defs/tree"})
    assert not refers_to_itself({"$defs": {"tree": {"anyOf": [{"type": "null"}, tree]}}, "anyOf": [tree, tree]})
    assert not refers_to_itself({"type": "object", "properties": {"next": {"$ref": "#"}}})
    assert not refers_to_itself({"schema": {"properties": {"next": {"items": {"$ref": "#"}}}}})
    both = {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/leaf"}]}
    assert not refers_to_itself({"$defs": {"leaf": {"type": "null"}, "a": both, "b": both}, **both})


def test_a_long_chain_of_references_is_followed_once() -> None:
    """Following the chain to its end from each of its names would take a seventh of a second."""
    lookups = 0

    class Counting(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal lookups
            lookups += key == "$ref"
            return super().get(key, default)

    chain = {"$defs": {f"d{n}": Counting({"$ref": f"#/$defs/d{n + 1}"}) for n in range(900)}}
    assert not refers_to_itself(chain)
    assert lookups <= 2 * 900
