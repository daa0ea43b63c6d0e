from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.errors import BadRequestError, UnsupportedMediaTypeError
from xgen_proxy.request.json_body import check_structure, read_json
from xgen_proxy.request.limits import Limits

JSON = {b"content-type": b"application/json"}
VALUES = st.recursive(
    st.none() | st.integers(0, 9) | st.text(st.characters(codec="utf-8") | st.sampled_from('[]{},"\\'), max_size=9),
    lambda children: st.lists(children) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), children),
)


@pytest.mark.parametrize("headers", [{}, JSON, {b"content-type": b"Application/JSON; charset=utf-8"}])
def test_json_object(headers: dict[bytes, bytes]) -> None:
    assert read_json(b'{"a": 1}', headers, Limits()) == {"a": 1}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 2000 + b"]" * 2000, "nested deeper than 64 levels"),
        (b"[" * 2000, "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object"),
    ],
)
def test_anything_else_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_json(raw, JSON, Limits())


@pytest.mark.parametrize("media_type", [b"", b"text/plain", b"application/x-www-form-urlencoded"])
def test_other_media_types_are_refused(media_type: bytes) -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        read_json(b"{}", {b"content-type": media_type}, Limits())


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def count(value: Any) -> tuple[int, int]:
    """(values, levels of arrays and objects), recursively. An empty array or object counts as two values."""
    if not isinstance(value, dict | list):
        return 1, 0
    below = [count(child) for child in (value.values() if isinstance(value, dict) else value)]
    return 1 + (sum(values for values, _ in below) or 1), 1 + max((levels for _, levels in below), default=0)


def allows(raw: bytes, **limits: int) -> bool:
    try:
        none = {"json_nodes": 10**9, "json_depth": 10**9}
        check_structure(raw, Limits().model_copy(update=none | limits))
    except BadRequestError:
        return False
    return True


@given(VALUES)
def test_values_and_levels_are_counted_as_the_parser_would(value: Any) -> None:
    raw = orjson.dumps(value)
    values, levels = count(value)
    assert allows(raw, json_nodes=values, json_depth=levels)
    if levels:
        assert not allows(raw, json_nodes=values - 1)
        assert not allows(raw, json_depth=levels - 1)


def test_a_request_that_is_too_deep_or_too_large_is_refused() -> None:
    with pytest.raises(BadRequestError, match="nested deeper than 64 levels"):
        read_json(orjson.dumps({"a": nested(70)}), JSON, Limits())
    with pytest.raises(BadRequestError, match="more than 1000 values"):
        read_json(orjson.dumps({"a": list(range(2000))}), JSON, Limits(json_nodes=1000))
    with pytest.raises(BadRequestError, match="more than 1000 values"):
        read_json(b'{"a": [' + b'"",' * 3000 + b'""]}', JSON, Limits(json_nodes=1000))
    read_json(orjson.dumps({"a": nested(60), "b": list(range(900))}), JSON, Limits(json_nodes=1000))


def test_brackets_and_commas_in_text_do_not_count() -> None:
    text = '[{,\\",' * 10_000
    assert read_json(orjson.dumps({"a": text}), JSON, Limits(json_nodes=100)) == {"a": text}


def test_the_number_of_fields_is_limited() -> None:
    with pytest.raises(BadRequestError, match="300 fields; the limit is 256"):
        read_json(orjson.dumps({f"f{n}": 1 for n in range(300)}), JSON, Limits())


def test_the_number_of_escapes_is_limited() -> None:
    """They take the parser four times as long as letters."""
    read_json(orjson.dumps({"a": "\n" * 1_900_000}), JSON, Limits())
    with pytest.raises(BadRequestError, match="more than 2000000 escapes"):
        read_json(orjson.dumps({"a": "\n" * 2_100_000}), JSON, Limits())
