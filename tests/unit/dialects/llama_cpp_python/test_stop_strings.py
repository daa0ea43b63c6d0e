from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import call, delta, text
from xgen_proxy.dialects.llama_cpp_python.stop_strings import StopStringCutter, stop_strings, text_of


def stopped(pieces: list[str], strings: tuple[str, ...], finish: str = "length") -> tuple[str, str | None]:
    stops = StopStringCutter(strings)
    out = [cut for piece in pieces for cut in stops.cut(text(piece))]
    out += list(stops.cut(text("", finish)))
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in out if chunk["choices"][0]["finish_reason"]]
    assert len(reasons) == 1
    assert out[-1]["choices"][0]["finish_reason"] == reasons[0]
    return "".join(chunk["choices"][0]["text"] for chunk in out), reasons[0]


PIECES = st.lists(st.text("abc", min_size=1, max_size=3), max_size=8)
STRINGS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(PIECES, STRINGS)
def test_stop_strings_cut_as_llama_cpp_python_cuts(pieces: list[str], strings: list[str]) -> None:
    """After each token it looks for each of the strings in all of the text so far."""
    expected = "".join(pieces), "length"
    for count in range(1, len(pieces) + 1):
        so_far = "".join(pieces[:count])
        found = [string for string in strings if string in so_far]
        if found:
            expected = so_far[: so_far.index(found[0])], "stop"
            break
    assert stopped(pieces, tuple(strings)) == expected


def test_stop_strings_of_a_request() -> None:
    assert stop_strings({}) == ()
    assert stop_strings({"stop": None}) == ()
    assert stop_strings({"stop": ""}) == ()
    assert stop_strings({"stop": "a"}) == ("a",)
    assert stop_strings({"stop": ["a", "", "b"]}) == ("a", "b")


def test_a_stop_string_in_the_arguments_of_a_call() -> None:
    stops = StopStringCutter(("X",))
    out = [cut for chunk in (call('{"a'), call('X"}')) for cut in stops.cut(chunk)]
    assert "".join(text_of(chunk["choices"][0]) or "" for chunk in out) == '{"a'
    assert out[1]["choices"][0]["delta"]["function_call"]["arguments"] == ""
    assert out[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_as_many_and_as_long_strings_as_a_request_may_have() -> None:
    strings = tuple("a" * 255 + chr(ord("b") + n) for n in range(16))
    assert stopped(["x", "a" * 200, "a" * 100, "q", "z"], strings) == ("x" + "a" * 45, "stop")
    assert stopped(["x", "a" * 300, "z"], strings) == ("x" + "a" * 300 + "z", "length")


def test_text_held_back_comes_at_the_end() -> None:
    stops = StopStringCutter(("ab",))
    chat = [delta(role="assistant"), delta(content="xa"), delta("length")]
    out = [cut for chunk in chat for cut in stops.cut(chunk)]
    assert [text_of(chunk["choices"][0]) for chunk in out] == [None, "x", "a", None]
    assert list(stops.cut({"choices": []})) == [{"choices": []}]
