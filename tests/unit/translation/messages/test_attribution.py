from __future__ import annotations

import pytest

from xgen_proxy.translation.messages.attribution import without_attribution

HEADER = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=sdk-cli; cch=36ee5;"
YOU = "You are Claude Code."


@pytest.mark.parametrize(
    ("texts", "left"),
    [
        ([HEADER, YOU], [YOU]),
        ([HEADER + "\n", YOU, "More."], [YOU, "More."]),
        ([f"{HEADER}\n{YOU}"], [YOU]),
        ([f"{HEADER}{YOU}"], [YOU]),
        ([f"{HEADER} {YOU}"], [YOU]),
        ([f"{HEADER[:-1]}\n{YOU}"], [YOU]),  # no semicolon at the end
        ([HEADER], []),
        (["x-anthropic-billing-header: v2 0aaa9", YOU], [YOU]),  # another format, in a block of its own
        ([f"x-anthropic-billing-header: v2 0aaa9\n{YOU}"], [YOU]),
        ([f"x-anthropic-billing-header: {HEADER}"], [f"{YOU}"][:0]),
    ],
)
def test_the_block_is_left_out(texts: list[str], left: list[str]) -> None:
    assert without_attribution(texts) == left


@pytest.mark.parametrize("texts", [[], [""], [YOU], [YOU, HEADER], [f"{YOU}\n{HEADER}"], [f" {HEADER}"]])
def test_only_at_the_beginning(texts: list[str]) -> None:
    """What a person writes about the header stays."""
    assert without_attribution(texts) == texts


def test_two_requests_begin_alike() -> None:
    first, second = (without_attribution([HEADER.replace("36ee5", hash), YOU]) for hash in ("36ee5", "0aaa9"))
    assert first == second
