"""The content of a chat message, from its parts."""

from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.translation.content_parts import as_content, as_part

IMAGE = {"type": "image_url", "image_url": {"url": "https://a/b.png"}}


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        ([], ""),
        ([as_part("")], ""),
        ([as_part("a")], "a"),
        ([as_part("a"), as_part(""), as_part("b")], "a\nb"),
        ([as_part("a"), IMAGE, as_part("b")], [as_part("a"), IMAGE, as_part("b")]),
        ([as_part(""), IMAGE], [IMAGE]),
    ],
)
def test_texts_become_one(parts: list[dict[str, Any]], content: Any) -> None:
    assert as_content(parts) == content
