"""Turns, as chat templates want them."""

from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.translation.messages.blocks import Dropped
from xgen_proxy.translation.messages.conversation import chat_messages, prefill_flags

Json = dict[str, Any]
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "https://a/b.png"}}
USE = {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "a"}}
CALL = {"id": "t1", "type": "function", "function": {"name": "read", "arguments": '{"path":"a"}'}}
ATTRIBUTION = "x-anthropic-billing-header: cc_version=2; cch=1;"


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def result(content: Any = "done", id: str = "t1", **fields: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **fields}


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> Json:
    return {"role": "assistant", "content": content, **fields}


def tool(content: str, id: str = "t1") -> Json:
    return {"role": "tool", "tool_call_id": id, "content": content}


def translated(*messages: Json, system: Any = None, strip: bool = True) -> list[Json]:
    return chat_messages(system, list(messages), {}, strip_attribution=strip)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, None),
        ("", None),
        ([], None),
        ("Be brief.", "Be brief."),
        ([{**text("a"), "cache_control": {"type": "ephemeral"}}, text("b")], "a\n\nb"),
        ([text(ATTRIBUTION), text("a")], "a"),
        (f"{ATTRIBUTION}\na", "a"),
        ([text(ATTRIBUTION)], None),
    ],
)
def test_the_system_prompt_is_one_leading_message(system: Any, expected: str | None) -> None:
    found = translated(user("Hi"), system=system)
    assert found == ([] if expected is None else [{"role": "system", "content": expected}]) + [user("Hi")]


def test_the_attribution_stays_where_the_setting_says_so() -> None:
    found = translated(user("Hi"), system=[text(ATTRIBUTION), text("a")], strip=False)
    assert found[0]["content"] == f"{ATTRIBUTION}\n\na"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("Hi")], [user("Hi")]),
        ([user([text("a"), text("b")])], [user("a\nb")]),
        ([user("a"), user("b")], [user("a\nb")]),  # as Anthropic combines them
        ([user([text("see"), IMAGE])], [user([text("see"), IMAGE_PART])]),
        ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
        ([user("a"), assistant([text("b")]), assistant([text("c")])], [user("a"), assistant("bc")]),
        ([user("a"), assistant([]), user("b")], [user("a\nb")]),
        # system messages, as newer clients send them
        (
            [{"role": "system", "content": "S"}, user("a")],
            [{"role": "system", "content": "S"}, user("a")],
        ),
        (
            [user("a"), assistant("b"), {"role": "system", "content": [text("S")]}, user("c")],
            [user("a"), assistant("b"), user("<system-reminder>\nS\n</system-reminder>\nc")],
        ),
        # tools
        (
            [user("a"), assistant([text("I read."), USE]), user([result()])],
            [user("a"), assistant("I read.", tool_calls=[CALL]), tool("done")],
        ),
        (
            [assistant([USE]), user([text("before"), result("1"), text("after"), result("2", "t2")])],
            [assistant("", tool_calls=[CALL]), tool("1"), tool("2", "t2"), user("before\nafter")],
        ),
        (
            [assistant([USE]), {"role": "system", "content": "S"}, user([result()])],
            [assistant("", tool_calls=[CALL]), tool("done"), user("<system-reminder>\nS\n</system-reminder>")],
        ),
        ([user([result(None)])], [tool("")]),
        ([user([result([text("a"), text("b")])])], [tool("a\nb")]),
        ([user([result("no such file", is_error=True)])], [tool("Error: no such file")]),
        ([user([result("Error: no", is_error=True)])], [tool("Error: no")]),
        ([user([result("<tool_use_error>no", is_error=True)])], [tool("<tool_use_error>no")]),
        ([user([result([], is_error=True)])], [tool("Error")]),
        (
            [user([result([text("a picture"), IMAGE]), text("What is it?")])],
            [
                tool("a picture\n[image]"),
                user([text("The images in the result of t1:"), IMAGE_PART, text("What is it?")]),
            ],
        ),
        ([user([result([{"type": "tool_reference", "tool_name": "grep"}])])], [tool("grep")]),
        # thoughts
        (
            [assistant([{"type": "thinking", "thinking": "Hm", "signature": "s"}, text("a")]), user("b")],
            [assistant("a", reasoning_content="Hm", reasoning="Hm"), user("b")],
        ),
        ([assistant([{"type": "redacted_thinking", "data": "x"}, text("a")])], [assistant("a")]),
    ],
)
def test_turns(messages: list[Json], expected: list[Json]) -> None:
    assert translated(*messages) == expected


def compaction(content: Any) -> Json:
    return {"type": "compaction", "content": content, "encrypted_content": "gA"}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([compaction("Summary.\n")], assistant("Summary.")),
        ([compaction("Summary."), text("So"), text(" on")], assistant("Summary.\n\nSo on")),
        ([compaction("Summary."), USE], assistant("Summary.", tool_calls=[CALL])),
    ],
)
def test_the_summary_of_a_compaction_is_the_assistants_text(blocks: list[Json], expected: Json) -> None:
    dropped: Dropped = {}
    found = chat_messages(None, [user("a"), assistant(blocks), user("b")], dropped, strip_attribution=True)
    assert found == [user("a"), expected, user("b")]
    assert not dropped


@pytest.mark.parametrize("content", [None, "", " ", 5, ["x"]])
def test_a_compaction_that_failed_is_ignored(content: Any) -> None:
    dropped: Dropped = {}
    messages = [user("a"), assistant([compaction(content)]), user([compaction("Summary."), text("b")])]
    assert chat_messages(None, messages, dropped, strip_attribution=True) == [user("a\nb")]
    assert list(dropped) == ["compaction"]


def test_what_ran_at_anthropic_is_told() -> None:
    dropped: Dropped = {}
    blocks = [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, text("found")]
    changes = {"role": "system", "content": [{"type": "tool_removal", "tool": {}}]}
    found = chat_messages(None, [assistant(blocks), changes, user("go on")], dropped, strip_attribution=True)
    assert found == [assistant("found"), user("go on")]
    assert list(dropped) == ["server_tool_use", "tool_removal"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("Hi", "messages.1.role"),
        ({"content": "Hi"}, "messages.1.role"),
        ({"role": "tool", "content": "Hi"}, "messages.1.role"),
        ({"role": ["user"], "content": "Hi"}, "messages.1.role"),
        (user(None), "messages.1.content"),
        (user(["Hi"]), "messages.1.content.0"),
        (user([{"type": "text"}]), "messages.1.content.0.text"),
        (user([USE]), "messages.1.content.0.type"),
        (assistant([IMAGE]), "messages.1.content.0.type"),
        (assistant([result()]), "messages.1.content.0.type"),
        (assistant([{**USE, "input": "x"}]), "messages.1.content.0.input"),
        (assistant([{**USE, "id": None}]), "messages.1.content.0.id"),
        (user([{"type": "tool_result", "content": "x"}]), "messages.1.content.0.tool_use_id"),
        (user([result(5)]), "messages.1.content.0.content"),
        (user([result([{"type": "image"}])]), "messages.1.content.0.content.0.source"),
        (user([result("x", is_error="yes")]), "messages.1.content.0.is_error"),
        ({"role": "system", "content": 5}, "messages.1.content"),
    ],
)
def test_a_bad_message_is_named(message: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as error:
        translated(user("Hi"), message)
    assert error.value.param == param
    assert param in error.value.message


def test_a_final_assistant_message_is_continued() -> None:
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    assert prefill_flags(assistant("The answer is (")) == flags
    for last in (user("a"), user([IMAGE_PART]), tool("a"), assistant(""), assistant("a", tool_calls=[CALL])):
        assert prefill_flags(last) == {}
    with pytest.raises(BadRequestError, match="white space"):
        prefill_flags(assistant("a "))
