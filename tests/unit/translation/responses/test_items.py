"""Input items as messages of a chat."""

from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.translation.responses.items import read_messages

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x":1}'}
CALL_B = {"type": "function_call", "call_id": "b", "name": "g", "arguments": ""}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "42"}
CALLED = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
CALLED_B = {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "42"}
PIXEL = "data:image/png;base64,AAAA"
IMAGE = {"type": "input_image", "image_url": PIXEL, "detail": "auto"}
SEEN = {"type": "image_url", "image_url": {"url": PIXEL}}

NOTE = {"role": "developer", "content": "B"}
NOTED = {"role": "user", "content": "<system-reminder>\nB\n</system-reminder>"}


def said(text: str, kind: str = "output_text") -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": kind, "annotations": [], "text": text}],
    }


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def thought(text: str) -> dict[str, Any]:
    return {"reasoning": text, "reasoning_content": text}


THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
SUMMARY = {"content": [], "encrypted_content": "gA", "summary": [{"type": "summary_text", "text": "S"}]}

CONVERSATIONS: list[tuple[str, Any, list[dict[str, Any]]]] = [
    ("a string", "Hi", [USER]),
    ("an easy message", [{"role": "user", "content": "Hi"}], [USER]),
    ("one part", [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], [USER]),
    ("no content", [{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
    (
        "several parts, as Codex sends",
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
        [{"role": "user", "content": "a\nb"}],
    ),
    ("messages of the user in a row", [USER, {"role": "user", "content": "b"}], [{"role": "user", "content": "Hi\nb"}]),
    (
        "an image and a text in a row",
        [{"role": "user", "content": [IMAGE]}, USER],
        [{"role": "user", "content": [SEEN, {"type": "text", "text": "Hi"}]}],
    ),
    ("no content beside some", [USER, {"role": "user", "content": []}], [USER]),
    (
        "no content between two answers",
        [said("a"), {"role": "user", "content": []}, said("b")],
        [assistant("a"), {"role": "user", "content": ""}, assistant("b")],
    ),
    (
        "an image",
        [{"role": "user", "content": [{"type": "input_text", "text": "What?"}, IMAGE]}],
        [{"role": "user", "content": [{"type": "text", "text": "What?"}, SEEN]}],
    ),
    (
        "an image in detail",
        [{"role": "user", "content": [{**IMAGE, "detail": "high"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL, "detail": "high"}}]}],
    ),
    (
        "a file",
        [{"role": "user", "content": [{"type": "input_file", "filename": "a.pdf", "file_data": "data:x"}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"file_data": "data:x", "filename": "a.pdf"}}]}],
    ),
    (
        "a sound",
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}}]}],
    ),
    (
        "system and developer messages at the front",
        [
            {"role": "system", "content": "A"}, {"role": "developer", "content": [{"type": "input_text", "text": "B"}]},
            USER,
        ],
        [{"role": "system", "content": "A\n\nB"}, USER],
    ),
    (
        "others are the user's, and the prompt begins as it did",
        [{"role": "system", "content": "A"}, USER, NOTE, said("Hello"), NOTE, NOTE, USER],
        [
            {"role": "system", "content": "A"}, {"role": "user", "content": f"Hi\n{NOTED['content']}"},
            assistant("Hello"), {"role": "user", "content": f"{NOTED['content']}\n{NOTED['content']}\nHi"},
        ],
    ),
    (
        "one between a call and its result",
        [USER, CALL, NOTE, OUTPUT, said("Done")],
        [USER, assistant(None, tool_calls=[CALLED]), RESULT, NOTED, assistant("Done")],
    ),
    ("one after the assistant's first words", [said("Hello"), NOTE], [assistant("Hello"), NOTED]),
    ("an answer that the client sends back", [USER, said("Hello"), USER], [USER, assistant("Hello"), USER]),
    (
        "a refusal",
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}, USER],
        [USER, assistant("No"), USER],
    ),
    (
        "a turn that thinks, speaks and calls",
        [USER, THOUGHT, said("Let me see"), CALL, OUTPUT],
        [USER, assistant("Let me see", **thought("Hm"), tool_calls=[CALLED]), RESULT],
    ),
    (
        "parallel calls",
        [USER, CALL, CALL_B, OUTPUT, {**OUTPUT, "call_id": "b"}],
        [USER, assistant(None, tool_calls=[CALLED, CALLED_B]), RESULT, {**RESULT, "tool_call_id": "b"}],
    ),
    (
        "calls one after another",
        [USER, CALL, OUTPUT, CALL_B, {**OUTPUT, "call_id": "b"}, said("Done")],
        [
            USER, assistant(None, tool_calls=[CALLED]), RESULT,
            assistant(None, tool_calls=[CALLED_B]), {**RESULT, "tool_call_id": "b"}, assistant("Done"),
        ],
    ),
    ("thoughts that led to nothing", [USER, THOUGHT, USER], [{"role": "user", "content": "Hi\nHi"}]),
    (
        "a summary of thoughts, and an encrypted original",
        [USER, {**THOUGHT, **SUMMARY}, said("x")],
        [USER, assistant("x", **thought("S"))],
    ),
    ("only encrypted thoughts", [USER, {"type": "reasoning", "encrypted_content": "gA", "summary": []}, said("x")],
     [USER, assistant("x")]),
    (
        "a custom tool",
        [
            USER, {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "*** Begin\n\"x\""},
            {"type": "custom_tool_call_output", "call_id": "a", "output": "ok"},
        ],
        [
            USER,
            assistant(None, tool_calls=[{
                "id": "a", "type": "function",
                "function": {"name": "apply_patch", "arguments": '{"input":"*** Begin\\n\\"x\\""}'},
            }]),
            {**RESULT, "content": "ok"},
        ],
    ),
    (
        "a tool in a namespace",
        [USER, {**CALL, "namespace": "mcp__git"}],
        [USER, assistant(None, tool_calls=[{**CALLED, "function": {"name": "mcp__git__f", "arguments": '{"x":1}'}}])],
    ),
    (
        "a local shell, from a conversation that began elsewhere",
        [
            USER,
            {"type": "local_shell_call", "id": "l", "call_id": "a", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "local_shell_call_output", "id": "a", "output": "x"},
        ],
        [
            USER,
            assistant(None, tool_calls=[{
                "id": "a", "type": "function",
                "function": {"name": "local_shell", "arguments": '{"type":"exec","command":["ls"]}'},
            }]),
            {**RESULT, "content": "x"},
        ],
    ),
    (
        "a shell and a patch of OpenAI's own tools",
        [
            USER,
            {"type": "shell_call", "call_id": "a", "action": {"commands": ["ls"]}},
            {"type": "apply_patch_call", "call_id": "b", "operation": {"type": "delete_file", "path": "x"}},
            {"type": "shell_call_output", "call_id": "a", "output": [{"stdout": "x", "stderr": ""}]},
            {"type": "apply_patch_call_output", "call_id": "b", "status": "completed", "output": "ok"},
        ],
        [
            USER,
            assistant(None, tool_calls=[
                {"id": "a", "type": "function", "function": {"name": "shell", "arguments": '{"commands":["ls"]}'}},
                {"id": "b", "type": "function",
                 "function": {"name": "apply_patch", "arguments": '{"type":"delete_file","path":"x"}'}},
            ]),
            {**RESULT, "content": '[{"stdout":"x","stderr":""}]'},
            {**RESULT, "tool_call_id": "b", "content": "ok"},
        ],
    ),
    (
        "a call that was cut off, which engines refuse",
        [USER, {**CALL, "arguments": '{"x'}],
        [USER, assistant(None, tool_calls=[
            {**CALLED, "function": {"name": "f", "arguments": '{"INVALID_JSON":"{\\"x"}'}},
        ])],
    ),
    (
        "a result in parts",
        [USER, CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
        [USER, assistant(None, tool_calls=[CALLED]), {**RESULT, "content": "a\nb"}],
    ),
    (
        "images in results follow the last result",
        [USER, CALL, CALL_B, {**OUTPUT, "output": [IMAGE]}, {**OUTPUT, "call_id": "b"}, said("I see")],
        [
            USER, assistant(None, tool_calls=[CALLED, CALLED_B]), {**RESULT, "content": "The result follows."},
            {**RESULT, "tool_call_id": "b"}, {"role": "user", "content": [SEEN]}, assistant("I see"),
        ],
    ),
    ("an image in the last result", [USER, CALL, {**OUTPUT, "output": [IMAGE]}],
     [USER, assistant(None, tool_calls=[CALLED]), {**RESULT, "content": "The result follows."},
      {"role": "user", "content": [SEEN]}]),
    ("an image in the last result, and the user's words", [USER, CALL, {**OUTPUT, "output": [IMAGE]}, USER],
     [USER, assistant(None, tool_calls=[CALLED]), {**RESULT, "content": "The result follows."},
      {"role": "user", "content": [SEEN, {"type": "text", "text": "Hi"}]}]),
    ("the user's words between a call and its result", [USER, CALL, USER, OUTPUT],
     [USER, assistant(None, tool_calls=[CALLED]), RESULT, USER]),
]  # fmt: skip


@pytest.mark.parametrize(("items", "messages"), [pytest.param(*row[1:], id=row[0]) for row in CONVERSATIONS])
def test_items_become_messages(items: Any, messages: list[dict[str, Any]]) -> None:
    assert read_messages({"input": items}) == (messages, ())


def test_instructions_come_first() -> None:
    body = {"instructions": "Be brief.", "input": [{"role": "system", "content": "You are a cat."}, USER]}
    assert read_messages(body)[0] == [{"role": "system", "content": "Be brief.\n\nYou are a cat."}, USER]


def test_calls_of_hosted_tools_are_dropped_and_told_once() -> None:
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    assert read_messages({"input": [USER, search, search, said("Found")]}) == (
        [USER, assistant("Found")],
        ("web_search_call",),
    )


REFUSED = [
    ({}, "input", "input is missing"),
    ({"input": None}, "input", "input is missing"),
    ({"input": 5}, "input", "input must be a string or an array"),
    ({"input": []}, "input", "input is empty"),
    ({"input": ["Hi"]}, "input.0", "must be an object"),
    ({"input": [{}]}, "input.0", "has no type; this proxy takes message"),
    ({"input": [{"type": ["message"]}]}, "input.0", "has no type"),
    ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input.0", "has the type 'compaction'"),
    ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "input.1", "send the item itself"),
    ({"input": [{"id": "msg_1"}]}, "input.0", "send the item itself"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "function_call_output"),
    ({"input": [{"role": "user", "content": 5}]}, "input.0.content", "a string or a list of parts"),
    ({"input": [{"role": "user", "content": ["Hi"]}]}, "input.0.content.0", "this proxy takes input_text"),
    ({"input": [{"role": "user", "content": [{"type": {}}]}]}, "input.0.content.0", "this proxy takes input_text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input.0.content.0.text", "string"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input.0.content.0.image_url",
        "keeps no files",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "http://x"}]}]},
        "input.0.content.0.file_data",
        "as a data URL",
    ),
    ({"input": [{"role": "system", "content": [IMAGE]}]}, "input.0.content", "only messages of the user"),
    ({"input": [{"type": "function_call", "call_id": "a"}]}, "input.0.name", "which tool"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id", "joins a call"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id", "joins a call"),
    ({"input": [{**CALL, "arguments": {}}]}, "input.0.arguments", "must be a string"),
    ({"input": "Hi", "instructions": ["x"]}, "instructions", "must be a string"),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequestError, match=words) as refused:
        read_messages(body)
    assert refused.value.param == param
