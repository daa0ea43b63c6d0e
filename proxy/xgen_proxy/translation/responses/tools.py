"""Tools: what of the client's can be offered to a chat, and calls of them in the client's words.

A custom tool takes free text. A chat has only functions, so it is offered as one with a single text, `input`. A tool in
a namespace is offered under a joined name. vLLM does the same for its own /v1/responses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import FUNCTION_NAME_LENGTH, get_field
from xgen_proxy.values import frozen

INPUT = "input"
INPUT_SCHEMA = {
    "type": "object",
    "properties": {INPUT: {"type": "string", "description": "The text that the tool takes, as it is."}},
    "required": [INPUT],
    "additionalProperties": False,
}
NO_PARAMETERS: Json = {"type": "object", "properties": {}}
MODES = ("none", "auto", "required")
OFFERED = ("function", "custom")
# Codex's own description says not to wrap the text in JSON.
HOW_TO_CALL = f"Call this tool as a function: its text is the value of `{INPUT}`."
INPUT_BEGINS = re.compile(r'\s*\{\s*"input"\s*:\s*"')
LONGEST_BEGIN = 100  # characters
HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
LOW = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
# What the next piece may complete: an escape, or a high surrogate whose low one follows.
UNFINISHED = rf"(?:{HIGH})?(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?\Z"
# Matched again and again: in one pattern a repeat would keep a state for each character, and a possessive repeat of a
# lookahead goes wrong in Python 3.11.2.
COMPLETE_TEXT = re.compile(rf'[^"\\]+|(?!{UNFINISHED})(?:{HIGH}{LOW}|\\.)', re.DOTALL)
ESCAPED_BACKSLASH = r"\\"
# One that begins no escape of JSON, as in the \d of a pattern. Escaped backslashes are taken out before.
LONE_BACKSLASH = re.compile(r'\\(?!["/bfnrt]|u[0-9a-fA-F]{4})')
Names = tuple[str | None, str | None, str | None]  # of a tool: its kind, namespace and name


@frozen
class Tool:
    """A tool of the client's: what a call of it must say."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None

    @property
    def chat_name(self) -> str:
        return f"{self.namespace}__{self.name}" if self.namespace else self.name


@frozen
class Tools:
    """`offered`: the chat's tools. `by_name`: the client's own, by the name that the chat knows. `choice`: the chat's
    tool_choice. `dropped`: the types of those that no engine has."""

    offered: tuple[Json, ...]
    by_name: Mapping[str, Tool]
    choice: str | Json | None
    dropped: tuple[str, ...]

    def find(self, chat_name: str) -> Tool:
        """Unknown names become function calls, so that the client reports the mistake to the model."""
        return self.by_name.get(chat_name) or Tool("function", chat_name)


def read_tools(body: Json) -> Tools:
    """Raises BadRequestError."""
    offered: dict[Tool, Json] = {}
    dropped: dict[str, None] = {}  # in order, once each
    for where, tool, namespace in _each_tool(body):
        kind = tool["type"]
        if kind in OFFERED:
            name = _name(tool, where)
            offered[Tool(kind, name, namespace)] = _function(tool, where)
        else:
            dropped[kind] = None
    return _choose(body.get("tool_choice"), offered, tuple(dropped))


def _each_tool(body: Json) -> Iterator[tuple[str, Json, str | None]]:
    """(where it is, the tool, its namespace)."""
    for index, tool in enumerate(get_field(body, "tools", list) or ()):
        where = f"tools.{index}"
        _check_tool(tool, where)
        if tool["type"] != "namespace":
            yield where, tool, None
            continue
        namespace = _name(tool, where)
        for number, inner in enumerate(get_field(tool, "tools", list, f"{where}.tools") or ()):
            _check_tool(inner, f"{where}.tools.{number}")
            yield f"{where}.tools.{number}", inner, namespace


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        raise BadRequestError(f"{where} must be an object with a type, such as function", param=where)


def _name(tool: Json, where: str) -> str:
    name = get_field(tool, "name", str, f"{where}.name")
    if name and len(name) > FUNCTION_NAME_LENGTH:  # a namespace's name is repeated for each of its tools
        raise BadRequestError(
            f"{where}.name has {len(name)} characters; the limit is {FUNCTION_NAME_LENGTH}", param=f"{where}.name"
        )
    if name:
        return str(name)
    hint = "; in this API it stands beside type, not in function" if "function" in tool else ""
    raise BadRequestError(f"{where}.name is missing{hint}", param=f"{where}.name")


def _function(tool: Json, where: str) -> Json:
    """All but its name."""
    description = get_field(tool, "description", str, f"{where}.description")
    if tool["type"] == "custom":
        texts = [text for text in (description, HOW_TO_CALL, _grammar(tool, where)) if text]
        return {"description": "\n\n".join(texts), "parameters": INPUT_SCHEMA}
    parameters = get_field(tool, "parameters", dict, f"{where}.parameters")
    function: Json = {"description": description} if description else {}
    function["parameters"] = parameters or NO_PARAMETERS
    return {**function, "strict": True} if tool.get("strict") is True else function


def _grammar(tool: Json, where: str) -> str:
    """The grammar as a part of the description: an engine cannot enforce one within a JSON text."""
    form = get_field(tool, "format", dict, f"{where}.format") or {}
    definition = get_field(form, "definition", str, f"{where}.format.definition")
    syntax = get_field(form, "syntax", str, f"{where}.format.syntax")
    named = f" ({syntax})" if syntax else ""
    return f"`{INPUT}` follows this grammar{named}:\n{definition}" if definition else ""


def _choose(choice: Any, offered: Mapping[Tool, Json], dropped: tuple[str, ...]) -> Tools:
    chosen: str | Json | None = None
    if isinstance(choice, str):
        if choice not in MODES:
            raise BadRequestError(f"tool_choice must be {', '.join(MODES)} or an object", param="tool_choice")
        chosen = choice
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        chosen = choice.get("mode", "auto")
        if chosen not in ("auto", "required"):
            raise BadRequestError("tool_choice.mode must be auto or required", param="tool_choice")
        offered = {tool: offered[tool] for tool in _allowed(choice, offered)}
    elif isinstance(choice, dict):
        tool = _find_chosen(choice, _by_names(offered))
        if tool is None:
            raise BadRequestError(
                "tool_choice must name a function or a custom tool that is in tools: no other kind can be had here",
                param="tool_choice",
            )
        chosen = {"type": "function", "function": {"name": tool.chat_name}}
    elif choice is not None:
        raise BadRequestError("tool_choice must be a string or an object", param="tool_choice")
    if not offered and chosen == "required":
        raise BadRequestError("tool_choice is required, but tools has no function", param="tool_choice")
    return Tools(
        tuple({"type": "function", "function": {"name": tool.chat_name, **offered[tool]}} for tool in offered),
        {tool.chat_name: tool for tool in offered},
        chosen if offered else None,
        dropped,
    )


def _allowed(choice: Json, offered: Mapping[Tool, Json]) -> list[Tool]:
    """In the order of `offered`, so that the prompt begins alike. Tools that were dropped count as not allowed."""
    named = get_field(choice, "tools", list, "tool_choice.tools") or []
    by_names = _by_names(offered)
    allowed = {_find_chosen(each, by_names) for each in named if isinstance(each, dict)}
    return [tool for tool in offered if tool in allowed]


def _by_names(offered: Mapping[Tool, Json]) -> dict[Names, Tool]:
    """The tools by all that a choice may call them; the first of a name has it."""
    found: dict[Names, Tool] = {}
    for tool in offered:
        for name in (tool.name, tool.chat_name):
            found.setdefault((tool.kind, None, name), tool)
            found.setdefault((tool.kind, tool.namespace, name), tool)
    return found


def _find_chosen(choice: Json, by_names: Mapping[Names, Tool]) -> Tool | None:
    try:
        return by_names.get((choice.get("type"), choice.get("namespace"), choice.get("name")))
    except TypeError:  # one of them is a list or an object
        return None


# -- calls -------------------------------------------------------------------------------------------------------------


def call_item(tool: Tool, item_id: str, call_id: str, content: str, status: str = "completed") -> Json:
    """A call as an output item. `content`: the text of a custom tool, or the JSON of a function."""
    is_custom = tool.kind == "custom"
    item: Json = {
        "id": item_id,
        "type": "custom_tool_call" if is_custom else "function_call",
        "status": status,
        "call_id": call_id,
        "name": tool.name,
        "input" if is_custom else "arguments": content,
    }
    return {**item, "namespace": tool.namespace} if tool.namespace else item


def encode_input(text: str) -> str:
    return orjson.dumps({INPUT: text}).decode()


def decode_input(arguments: str) -> str:
    """The text that a custom tool was called with. If the arguments were cut, the text as far as it came; any others
    are returned as they are, so that the tool fails visibly."""
    try:
        called = _lenient(arguments)
    except (ValueError, RecursionError):
        decoder = InputDecoder()
        text = decoder.feed(arguments)
        rest = arguments[decoder.read :].rstrip()
        was_cut = decoder.read and (rest == '"' or not rest.startswith('"'))
        return text if was_cut else arguments
    found = called.get(INPUT) if isinstance(called, dict) else None
    return _without_halves(found) if isinstance(found, str) else arguments


def _lenient(text: str) -> Any:
    """JSON in which a model may have left line breaks and backslashes unescaped."""
    parts = [LONE_BACKSLASH.sub(r"\\\\", part) for part in text.split(ESCAPED_BACKSLASH)]
    return json.loads(ESCAPED_BACKSLASH.join(parts), strict=False)


def _without_halves(text: str) -> str:
    """Half of a surrogate pair cannot be written as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class InputDecoder:
    """The text of a custom tool's call while its arguments, `{"input": "…"}`, still arrive.

    `read`: how many characters of the arguments were decoded. It is 0 if they begin otherwise.
    """

    def __init__(self) -> None:
        self.read = 0
        self._pending = ""  # of the arguments, what was not decoded yet
        self._ended = False

    def feed(self, piece: str) -> str:
        if self._ended:
            return ""
        self._pending += piece
        if not self.read:
            begun = INPUT_BEGINS.match(self._pending)
            if begun is None:
                self._ended = len(self._pending) > LONGEST_BEGIN
                return ""
            self._skip(begun.end())
        end = 0
        while found := COMPLETE_TEXT.match(self._pending, end):
            end = found.end()
        text = self._pending[:end]
        self._skip(end)
        self._ended = self._pending.startswith('"')
        return _without_halves(_lenient(f'"{text}"'))

    def _skip(self, size: int) -> None:
        self.read += size
        self._pending = self._pending[size:]


def tool_name(item: Json, where: str) -> str:
    """The name by which the chat knows the tool of a call from an earlier turn. Raises BadRequestError."""
    name = get_field(item, "name", str, f"{where}.name")
    if not name:
        raise BadRequestError(f"{where}.name is missing: which tool was called?", param=f"{where}.name")
    namespace = get_field(item, "namespace", str, f"{where}.namespace")
    return Tool("function", name, namespace).chat_name


def unknown(kind: Any, known: str) -> str:
    return f"has {f'the type {quoted(kind)}' if isinstance(kind, str) else 'no type'}; this proxy takes {known}"
