from __future__ import annotations

from xgen_proxy.request.features import HINTS


def test_a_hint_has_a_header_of_its_name() -> None:
    assert {name: header.decode() for name, header in HINTS.items()} == {
        name: f"x-{name.replace('_', '-')}" for name in HINTS
    }
