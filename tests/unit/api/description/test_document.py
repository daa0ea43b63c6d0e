"""The document is one that programs can read. tests/integration compares it with what a proxy answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema

from tests.support.documents import ROOT, table_rows, ticked
from xgen_proxy import __version__
from xgen_proxy.api.description.document import ANSWER_HEADERS, REQUEST_HEADERS, as_bytes, document, parameters

API = ROOT / "docs" / "api.md"


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_reference_leads_to_a_component_and_every_component_is_used() -> None:
    components = document()["components"]
    there = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "parameters", "headers")
        for name in components[kind]
    }
    unused = {"#/components/responses/405"}  # no operation answers its own method with it
    assert there - unused == set(references(document()))


def test_schemas_are_schemas() -> None:
    for schema in document()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_it_names_the_version_and_is_what_is_sent() -> None:
    assert document()["info"]["version"] == __version__
    assert document()["openapi"] == "3.1.0"
    assert as_bytes().startswith(b'{\n  "openapi": "3.1.0"')


def test_paths_have_the_parameters_that_they_name() -> None:
    for path, methods in document()["paths"].items():
        for operation in methods.values():
            names = {each["$ref"].rpartition("/")[2] for each in operation["parameters"]}
            assert all((f"{{{name}}}" in path) == (name in names) for name in ("model", "id"))


def test_headers_are_on_the_page() -> None:
    """tests/repo/test_docs.py compares docs/api.md with the code."""
    asked = {header.lower() for row in table_rows(API, "request header") for header in ticked(row[0])}
    answered = {header.lower() for row in table_rows(API, "answer header") for header in ticked(row[0])}
    described = {name.lower() for name, each in parameters().items() if each["in"] == "header"}
    assert {name.lower() for name in REQUEST_HEADERS} <= described
    assert described <= asked
    assert {name.lower() for name in ANSWER_HEADERS} <= answered


def test_examples_are_valid() -> None:
    for methods in document()["paths"].values():
        for operation in methods.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schema = {**content["schema"], "components": document()["components"]}
                jsonschema.Draft202012Validator(schema).validate(content["example"])
