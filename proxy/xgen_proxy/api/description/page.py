"""/docs: the document as one HTML page, made here, without scripts and without anything to load."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from xgen_proxy.api.description.document import document
from xgen_proxy.values import frozen

FOLDER = Path(__file__).parent
DEEPEST = 6  # levels of fields that are listed
CODE = re.compile(r"`([^`]+)`")
Json = dict[str, Any]


@frozen
class Field:
    """A row of a table of fields. `level`: how deep it lies."""

    name: str
    level: int
    type: str
    required: bool
    description: str


def style() -> str:
    return (FOLDER / "page.css").read_text(encoding="utf-8")


def policy(css: str) -> str:
    """Nothing may be loaded, run or embedded; the page's own style is named by its hash."""
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"{nothing}; img-src data:; style-src 'sha256-{digest}'"


def resolved(found: Json, description: Json) -> Json:
    """What a $ref leads to."""
    while "$ref" in found:
        found = _at(description, found["$ref"])
    return found


def _at(description: Json, reference: str) -> Json:
    for part in reference.removeprefix("#/").split("/"):
        description = description[part]
    return description


def fields(schema: Json, description: Json, level: int = 0) -> Iterator[Field]:
    """The fields of an object, each before those inside it."""
    schema = _object_in(resolved(schema, description), description)
    required = schema.get("required", ())
    for name, each in schema.get("properties", {}).items():
        inner = resolved(each, description)
        yield Field(name, level, type_of(inner, description), name in required, inner.get("description", ""))
        if level < DEEPEST:
            yield from fields(inner, description, level + 1)


def _object_in(schema: Json, description: Json) -> Json:
    """The first object among alternatives, or that of an array's items."""
    for each in schema.get("anyOf", ()):
        found = _object_in(resolved(each, description), description)
        if found.get("properties"):
            return found
    if "items" in schema:
        return _object_in(resolved(schema["items"], description), description)
    return schema


def type_of(schema: Json, description: Json) -> str:
    """In words: `integer 1–128`, `"a" | "b"`, `array of object`. Null is left out, since every field may be null."""
    schema = resolved(schema, description)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " | ".join(json.dumps(value) for value in values if value is not None)
    if "anyOf" in schema:
        kinds = [type_of(each, description) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kinds = schema.get("type", "any")
    kind = " or ".join(each for each in kinds if each != "null") if isinstance(kinds, list) else kinds
    if kind == "array" and not (items := type_of(schema.get("items", {}), description)).startswith("any"):
        kind = f"array of {items}"
    return str(kind) + _limits(schema)


def _limits(schema: Json) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high < 2**31 - 1:
        return f" {low}–{high}"
    if low is not None and low > -(2**31):
        return f" from {low}"
    for name, words in (("maxLength", "characters"), ("maxItems", "entries"), ("maxProperties", "entries")):
        if name in schema:
            return f", at most {schema[name]:,} {words}"
    return ""


def curl(method: str, path: str, operation: Json) -> str:
    """A command that works on a proxy without keys."""
    content = operation.get("requestBody", {}).get("content", {})
    words = f"curl http://127.0.0.1:8080{path}"
    if "application/json" in content:
        body = json.dumps(content["application/json"].get("example", {}), ensure_ascii=False)
        return f"{words} \\\n  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}"
    if content:
        [form] = content.values()
        fields = [f"-F {shlex.quote(f'{name}={value}')}" for name, value in form["example"].items()]
        return " \\\n  ".join([words, *fields])
    return words if method == "get" else words.replace("curl ", f"curl -X {method.upper()} ")


def formatted(text: str) -> Markup:
    """With `code` as code; everything else is escaped."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704


@cache
def page() -> tuple[str, str]:
    """(the page, its Content-Security-Policy)."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["formatted"] = formatted
    template = environment.from_string((FOLDER / "page.html").read_text(encoding="utf-8"))
    description, css = document(), style()
    html = template.render(
        document=description,
        css=Markup(css),  # noqa: S704
        operations=[
            (method, path, operation)
            for path, methods in description["paths"].items()
            for method, operation in methods.items()
        ],
        fields=lambda schema: list(fields(schema, description)),
        resolved=lambda found: resolved(found, description),
        curl=curl,
    )
    return html, policy(css)


async def docs(request: Request) -> Response:
    """Open, as openapi() is."""
    html, allowed = await run_in_threadpool(page)
    headers = {
        "content-security-policy": allowed,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(html, headers=headers)
