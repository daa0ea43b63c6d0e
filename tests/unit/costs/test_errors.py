"""CostError: its text is what the user reads."""

from __future__ import annotations

from xgen_proxy.costs.errors import CostError


def test_the_text_is_the_message() -> None:
    assert str(CostError("needs --prices FILE")) == "needs --prices FILE"
