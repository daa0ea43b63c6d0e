from __future__ import annotations

from typing import Any

from tests.support.chunks import LLAMA_CPP_PYTHON, TOOLS, Replica, call, delta, events, make_request, read
from xgen_proxy.dialects.llama_cpp_python.stop_strings import text_of

QUIET: dict[str, Any] = {}
ASKED: dict[str, Any] = {"stream_options": {"include_usage": True}}


async def test_usage_is_added_only_if_asked() -> None:
    for options, expected in (QUIET, b""), (ASKED, None):
        editor = LLAMA_CPP_PYTHON.stream_editor(make_request(stream=True, alias="public", **options))
        assert editor is not None
        out = read(editor.edit(events(delta(role="assistant"), delta(content="a"), delta("stop"))))
        assert {chunk["model"] for chunk in out} == {"public"}
        tail = await editor.finish(Replica().post)
        if expected is None:
            [last] = read(tail)
            assert last["usage"] == {"prompt_tokens": 37, "completion_tokens": 1, "total_tokens": 38}
            assert (last["choices"], last["id"], last["model"]) == ([], "chatcmpl-1", "public")
        else:
            assert tail == expected


def test_a_call_is_named_once() -> None:
    editor = LLAMA_CPP_PYTHON.stream_editor(make_request(stream=True, **TOOLS))
    assert editor is not None
    out = read(editor.edit(events(call("{"), call("}"), call(""), delta("tool_calls"))))
    deltas = [chunk["choices"][0]["delta"] for chunk in out]
    assert deltas[0] == {
        "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}}]
    }
    assert deltas[1] == {"tool_calls": [{"index": 0, "type": "function", "function": {"arguments": "}"}}]}
    assert deltas[3] == {}


def test_the_editor_stops_at_a_stop_string() -> None:
    editor = LLAMA_CPP_PYTHON.stream_editor(make_request(stream=True, stop="STOP"))
    assert editor is not None
    out = read(editor.edit(events(delta(role="assistant"), delta(content="a S"), delta(content="TO"))))
    assert not editor.done
    out += read(editor.edit(events(delta(content="P b"), delta(content="c"))))
    assert editor.done
    assert "".join(text_of(chunk["choices"][0]) or "" for chunk in out) == "a "
    assert out[-1]["choices"][0]["finish_reason"] == "stop"
    assert editor.edit(events(delta(content="d"))) == b""
