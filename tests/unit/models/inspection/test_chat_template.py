"""Whether a template knows tools is seen by rendering it."""

from __future__ import annotations

import pytest

from xgen_proxy.models.inspection.chat_template import MOST_CHARACTERS, knows_tools

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"default": PLAIN}, False),
        ({"default": TOOLS}, True),
        ({"default": PLAIN, "tool_use": TOOLS}, True),
        ({"default": "{% generation %}" + TOOLS + "{% endgeneration %}"}, True),
        ({"default": "{{ raise_exception('no') }}"}, None),
        ({"default": "{% nonsense %}"}, None),
        ({"default": "{{ messages.__class__.__mro__ }}" + TOOLS}, None),
        ({"default": "{% for m in messages %}{% continue %}{% endfor %}{{ strftime_now('%Y') }}"}, False),
        ({"default": "{{ 'x' * 10000000000 }}"}, None),
        ({"default": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"}, None),
        ({"default": PLAIN * (MOST_CHARACTERS // len(PLAIN) + 1)}, None),
        ({}, False),
    ],
)
def test_templates(templates: dict[str, str], expected: bool | None) -> None:
    assert knows_tools(templates) is expected
