"""The parts that the content of a user's turn becomes."""

from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.translation.content_parts import as_part
from xgen_proxy.translation.messages.blocks import UNREADABLE, Dropped, read_blocks, texts_of, user_parts

PNG = {"type": "base64", "media_type": "image/png", "data": "iVBOR"}


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def document(source: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, **fields}


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}, [as_part("Hi")]),
        ({"type": "text", "text": ""}, []),
        ({"type": "image", "source": PNG}, [url_part("data:image/png;base64,iVBOR")]),
        ({"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}, [url_part("https://a/b.png")]),
        (document({"type": "text", "media_type": "text/plain", "data": "words"}), [as_part("words")]),
        (
            document({"type": "text", "data": "words"}, title="T", context="C"),
            [as_part("T"), as_part("C"), as_part("words")],
        ),
        (
            document({"type": "content", "content": [{"type": "text", "text": "a"}, {"type": "image", "source": PNG}]}),
            [as_part("a"), url_part("data:image/png;base64,iVBOR")],
        ),
        (document({"type": "content", "content": "words"}), [as_part("words")]),
        (
            {"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "found"}]},
            [as_part("T (S)\nfound")],
        ),
    ],
)
def test_a_block_becomes_parts(block: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    dropped: Dropped = {}
    assert user_parts(block, "here", dropped) == parts
    assert not dropped


@pytest.mark.parametrize(
    ("block", "parts", "name"),
    [
        (
            document({"type": "base64", "media_type": "application/pdf", "data": "JV"}),
            [as_part(UNREADABLE)],
            "document",
        ),
        (document({"type": "file", "file_id": "f"}), [as_part(UNREADABLE)], "document"),
        ({"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, [], "web_search_tool_result"),
        ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, [], "server_tool_use"),
    ],
)
def test_what_no_engine_reads_is_told(block: dict[str, Any], parts: list[dict[str, Any]], name: str) -> None:
    dropped: Dropped = {}
    assert user_parts(block, "here", dropped) == parts
    assert list(dropped) == [name]


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({"type": "text"}, "here.text"),
        ({"type": "text", "text": 5}, "here.text"),
        ({"type": "audio"}, "here.type"),
        ({"type": "image"}, "here.source"),
        ({"type": "image", "source": "x"}, "here.source"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "here.source"),
        ({"type": "image", "source": {"type": "base64", "data": "x"}}, "here.source.media_type"),
        ({"type": "image", "source": {"type": "url"}}, "here.source.url"),
        ({"type": "document"}, "here.source"),
        ({"type": "document", "source": {"type": "text"}}, "here.source.data"),
        (document({"type": "content", "content": [{"type": "text"}]}), "here.source.content.0.text"),
        ({"type": "search_result", "source": "S", "content": []}, "here.title"),
        ({"type": "search_result", "title": "T", "source": "S", "content": [{"type": "image"}]}, "here.content.0.type"),
    ],
)
def test_a_bad_block_is_named(block: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as error:
        user_parts(block, "here", {})
    assert error.value.param == param
    assert param in error.value.message


@pytest.mark.parametrize(
    ("content", "param"), [(None, "c"), (5, "c"), ({"type": "text"}, "c"), (["Hi"], "c.0"), ([{"text": "Hi"}], "c.0")]
)
def test_content_is_a_text_or_blocks(content: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as error:
        read_blocks(content, "c")
    assert error.value.param == param


def test_texts() -> None:
    assert texts_of("Hi", "system") == ["Hi"]
    assert texts_of("", "system") == []
    assert texts_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "system") == ["a", "b"]
