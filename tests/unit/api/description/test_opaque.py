"""The routes that pass unread are described by what the proxy reads of them."""

from __future__ import annotations

from xgen_proxy.api.description.opaque import OPERATIONS, WORDS
from xgen_proxy.request.opaque.endpoints import OPAQUE


def test_every_route_has_words() -> None:
    assert set(WORDS) == set(OPAQUE)
    assert {operation.path for operation in OPERATIONS} == {endpoint.path for endpoint in OPAQUE.values()}


def test_forms_are_forms() -> None:
    forms = {operation.path for operation in OPERATIONS if operation.body_type == "multipart/form-data"}
    assert forms == {endpoint.path for endpoint in OPAQUE.values() if endpoint.form}
