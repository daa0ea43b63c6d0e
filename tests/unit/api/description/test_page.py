"""The page shows the whole document, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from xgen_proxy.api.description.document import OPERATIONS, document
from xgen_proxy.api.description.page import curl, fields, formatted, page, style, type_of

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Its elements, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def parsed() -> Page:
    found = Page()
    found.feed(page()[0])
    found.close()
    assert found.open == []
    return found


def test_it_loads_and_runs_nothing(parsed: Page) -> None:
    assert {tag for tag, _ in parsed.elements}.isdisjoint({"script", "img", "iframe", "object", "form", "base"})
    for _, attributes in parsed.elements:
        assert "style" not in attributes, "the policy forbids it"
        assert not any(name.startswith("on") for name in attributes)
        link = attributes.get("href") or attributes.get("src") or "#"
        assert link.startswith("#") or link in ("openapi.json", "data:,")
    assert not re.search(r"url\(|@import", style())


def test_the_policy_allows_its_own_style_only() -> None:
    html, policy = page()
    [css] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy


def test_every_operation_has_its_section_and_a_link_to_it(parsed: Page) -> None:
    ids = [attributes["id"] for tag, attributes in parsed.elements if tag == "section"]
    assert ids == [operation.id for operation in OPERATIONS]
    links = {attributes.get("href") for tag, attributes in parsed.elements if tag == "a"}
    assert {f"#{each}" for each in ids} <= links


def test_every_field_is_listed() -> None:
    html, _ = page()
    for name in document()["components"]["schemas"]["ChatRequest"]["properties"]:
        assert f"<code>{name}</code>" in html


def test_it_fits_every_screen() -> None:
    assert 'name="viewport"' in page()[0]
    assert "prefers-color-scheme: dark" in style()
    assert "@media (max-width" in style()


def test_text_is_escaped() -> None:
    assert formatted('a `<b>` & "c"') == "a <code>&lt;b&gt;</code> &amp; &#34;c&#34;"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string"}, "string"),
        ({"type": ["integer", "null"], "minimum": 1, "maximum": 128}, "integer 1–128"),
        ({"type": "integer", "minimum": 1, "maximum": 2**31 - 1}, "integer from 1"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "integer"),
        ({"type": ["string", "null"], "enum": ["a", "b", None]}, '"a" | "b"'),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 16}, "array of string, at most 16 entries"),
        ({"type": "array", "items": {"maxLength": 9}, "maxItems": 16}, "array, at most 16 entries"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]}, "string or array"),
        ({"$ref": "#/components/schemas/Error"}, "object"),
        ({}, "any"),
    ],
)
def test_types_in_words(schema: dict[str, Any], words: str) -> None:
    assert type_of(schema, document()) == words


def test_fields_of_fields() -> None:
    rows = {row.name: row for row in fields({"$ref": "#/components/schemas/ChatRequest"}, document())}
    assert (rows["messages"].level, rows["messages"].required) == (0, True)
    assert (rows["role"].level, rows["role"].required) == (1, True)
    assert rows["role"].type.startswith('"assistant" | ')
    assert not rows["temperature"].required


def test_curl() -> None:
    operation = document()["paths"]["/generate"]["post"]
    assert curl("post", "/generate", operation) == (
        "curl http://127.0.0.1:8080/generate \\\n  -H 'Content-Type: application/json' \\\n"
        """  -d '{"prompt": "One, two,", "max_tokens": 8}'"""
    )
    assert curl("get", "/health", {}) == "curl http://127.0.0.1:8080/health"
