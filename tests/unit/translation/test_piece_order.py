"""Pieces of several tool calls come one call after the other."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.translation.chat import Reasoning, Text, ToolCallPiece
from xgen_proxy.translation.piece_order import Content, PieceOrder, is_json, key_of


def call(index: int, arguments: str = "", id: str = "", name: str = "") -> ToolCallPiece:
    return ToolCallPiece(index, id, name, arguments)


def ordered(*pieces: Content) -> list[Content]:
    order = PieceOrder()
    return [*(out for piece in pieces for out in order.add(piece)), *order.rest()]


def test_pieces_in_order_pass_at_once() -> None:
    order = PieceOrder()
    pieces: list[Content] = [
        Reasoning("hm"),
        Text("a"),
        Text("b"),
        call(0, "{", "a", "f"),
        call(0, "}"),
        call(1, "{}", "b", "g"),
        Text("c"),
    ]
    for piece in pieces:
        assert [*order.add(piece)] == [piece]
    assert order.called


def test_what_alternates_is_held_until_the_open_call_is_complete() -> None:
    assert ordered(call(0, "{", "a", "f"), call(1, "[", "b", "g"), Text("x"), call(0, "}"), call(1, "]")) == [
        call(0, "{", "a", "f"), call(0, "}"), call(1, "[", "b", "g"), call(1, "]"), Text("x"),
    ]  # fmt: skip


def test_spaces_after_the_end_of_a_call_are_dropped() -> None:
    pieces = [call(0, "{}", "a", "f"), call(1, "{}", "b", "g")]
    assert ordered(*pieces, call(0, " "), call(0, " ", "a", "f")) == pieces


def test_calls_that_share_an_index_are_told_apart_by_their_ids() -> None:
    """Some servers send 0 for each call, or no index, which counts as 0."""
    assert ordered(call(0, '{"x":', "a", "f"), call(0, "1}"), call(0, "{}", "b", "f"), call(0, "", "b")) == [
        call(0, '{"x":', "a", "f"), call(0, "1}"), call(1, "{}", "b", "f"), call(1, "", "b"),
    ]  # fmt: skip


@pytest.mark.parametrize("first", [5, 0])
def test_calls_are_numbered_from_zero(first: int) -> None:
    assert [
        piece.index for piece in ordered(call(first, "{}"), call(first + 3, "{}")) if isinstance(piece, ToolCallPiece)
    ] == [0, 1]


ARGUMENTS = st.sampled_from(['{"a": 1}', '{"text": "}{"}', "{}", "[]", '{"cut": '])
CALLS = st.lists(ARGUMENTS, min_size=1, max_size=4)


@given(calls=CALLS, data=st.data())
def test_no_piece_of_a_call_is_lost_and_blocks_are_not_interleaved(calls: list[str], data: st.DataObject) -> None:
    """Whatever the order in which the calls advance."""
    waiting = {index: list(arguments) for index, arguments in enumerate(calls)}
    pieces: list[Content] = []
    while waiting:
        index = data.draw(st.sampled_from(sorted(waiting)))
        begun = len(waiting[index]) < len(calls[index])
        pieces.append(call(index, waiting[index].pop(0), "" if begun else f"id-{index}", "" if begun else "f"))
        if not waiting[index]:
            del waiting[index]
    out = ordered(*pieces)
    keys = [key for key, _ in groupby(map(key_of, out))]
    assert len(keys) == len(set(keys)) == len(calls)
    found = {piece.id: key_of(piece) for piece in out if isinstance(piece, ToolCallPiece) and piece.id}
    for index, arguments in enumerate(calls):
        number = found[f"id-{index}"]
        joined = "".join(piece.arguments for piece in out if isinstance(piece, ToolCallPiece) and piece.index == number)
        assert joined == arguments


def test_is_json() -> None:
    assert is_json("{}")
    assert not is_json("{")
    assert not is_json("")
