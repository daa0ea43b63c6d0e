"""The table and the routes of the app are the same, both ways."""

from __future__ import annotations

from starlette.routing import Route

from xgen_proxy.api.description.document import OPERATIONS
from xgen_proxy.api.description.operations import HINT_HEADERS
from xgen_proxy.app import create_app
from xgen_proxy.config.settings import Settings
from xgen_proxy.request.features import HINTS


def test_the_routes_of_the_app() -> None:
    front = create_app(Settings(backends={"llama_cpp": {"urls": ["http://127.0.0.1:1"]}}))
    served = {("POST", path) for path in front.inference_routes}
    for route in front.app.routes:
        assert isinstance(route, Route)
        methods = route.methods or {"POST"}
        served |= {(method, route.path.replace(":path", "")) for method in methods - {"HEAD"}}
    described = [(operation.method, operation.path) for operation in OPERATIONS]
    assert len(set(described)) == len(described)
    assert set(described) == served, "describe new routes in api/description"


def test_names_are_unique_and_for_code() -> None:
    names = [operation.id for operation in OPERATIONS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)


def test_summaries_are_headings_and_descriptions_are_sentences() -> None:
    for operation in OPERATIONS:
        assert not operation.summary.endswith("."), operation.path
        assert operation.description.endswith("."), operation.path
        assert all(answer.description.endswith(".") for answer in operation.answers.values()), operation.path


def test_every_hint_is_a_header_too() -> None:
    assert {header.lower().encode() for header in HINT_HEADERS} == set(HINTS.values())
