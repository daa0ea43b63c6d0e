"""The input of a request as the messages of a chat.

Instructions, and the system and developer messages before the conversation, become one system message: templates such
as Qwen's refuse a second one. What the assistant thought, said and called in one turn becomes one message. So does what
the user said: templates such as Gemma's and Mistral's refuse two messages of one role in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import orjson

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import get_field
from xgen_proxy.translation.chat import INVALID, REMINDER, is_object
from xgen_proxy.translation.content_parts import as_content, as_part
from xgen_proxy.translation.media_part import MediaPart
from xgen_proxy.translation.responses.tools import encode_input, tool_name, unknown

# Calls of tools that run at OpenAI. What they found stands in the assistant's text as well.
HOSTED = frozenset({
    "web_search_call", "file_search_call", "computer_call", "computer_call_output", "image_generation_call",
    "code_interpreter_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call",
    "tool_search_call", "tool_search_output", "additional_tools", "program", "program_output", "configuration_update",
})  # fmt: skip
KNOWN_ITEMS = "message, reasoning, calls of functions, custom tools, shells and apply_patch, and their outputs"
KNOWN_PARTS = "input_text, output_text, refusal, input_image, input_file and input_audio"
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
MOST_VALUES, LONG = 100_000, 1_000_000  # as many values, or characters, take 20 ms to parse
SHORT = 100  # characters; counting them takes longer than parsing
KEEPS_NO_FILES = "this proxy keeps no files"
# Calls of OpenAI's tools that the client runs: the field that says what to do. A chat knows them as functions.
ACTIONS = {"local_shell_call": "action", "shell_call": "action", "apply_patch_call": "operation"}


def read_messages(body: Json) -> tuple[list[Json], tuple[str, ...]]:
    """(the messages, the types of the items that were dropped). Raises BadRequestError."""
    conversation = Conversation()
    if instructions := get_field(body, "instructions", str):
        conversation.system.append(instructions)
    given = get_field(body, "input", (str, list))
    if given is None:
        raise BadRequestError("input is missing; send a string or a list of items", param="input")
    if isinstance(given, str):
        conversation.messages.append({"role": "user", "content": given})
    else:
        for index, item in enumerate(given):
            conversation.add(item, f"input.{index}")
    messages = conversation.finish()
    if not messages:
        raise BadRequestError("input is empty; send at least one item", param="input")
    return messages, tuple(conversation.dropped)


class Conversation:
    """Takes the items in order; finish() gives the messages.

    A turn of the assistant is collected until an item of another kind ends it, and a turn of the user until the
    assistant goes on. The user's turn also has the images that tools returned, because a tool's message has only text,
    and the system's reminders. It follows the last result.
    """

    def __init__(self) -> None:
        self.system: list[str] = []
        self.messages: list[Json] = []
        self.dropped: dict[str, None] = {}
        self._thoughts: list[str] = []
        self._said: list[str] = []
        self._calls: list[Json] = []
        self._user: list[Json] = []  # the parts of the user's present turn
        self._values = 0  # at most, in the arguments of all calls

    def add(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise BadRequestError(f"{where} must be an object, such as a message with role and content", param=where)
        kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else None)
        if kind == "item_reference":
            raise BadRequestError(
                f"{where} refers to an item by its id, but this proxy keeps no items; send the item itself (client"
                " libraries do so if store is false)",
                param=where,
            )
        if not isinstance(kind, str) or not (kind in self.READERS or kind in HOSTED):
            raise BadRequestError(f"{where} {unknown(kind, KNOWN_ITEMS)}", param=where)
        if kind in HOSTED:
            self.dropped[kind] = None
        else:
            self.READERS[kind](self, item, where)

    def finish(self) -> list[Json]:
        self._end_turn()
        self._end_user()
        if not self.system:
            return self.messages
        return [{"role": "system", "content": "\n\n".join(self.system)}, *self.messages]

    def _message(self, item: Json, where: str) -> None:
        role = item.get("role")
        parts = read_parts(item.get("content"), f"{where}.content")
        if role == "user":
            self._end_turn()
            self._user += parts or [as_part("")]
        elif role not in ("assistant", "system", "developer"):
            raise BadRequestError(
                f"{where}.role must be user, assistant, system or developer; the result of a tool is an item of type"
                " function_call_output",
                param=f"{where}.role",
            )
        elif any(part["type"] != "text" for part in parts):
            raise BadRequestError(
                f"{where}.content: only messages of the user have more than text", param=f"{where}.content"
            )
        elif text := "\n".join(part["text"] for part in parts):
            if role == "assistant":
                self._end_user()
                self._said.append(text)
            elif self.messages or self._user or self._said or self._calls:
                self._end_turn()
                self._user.append(as_part(REMINDER.format(text)))
            else:
                self.system.append(text)

    def _reasoning(self, item: Json, where: str) -> None:
        """`encrypted_content` is for OpenAI's eyes only."""
        for field in ("content", "summary"):
            parts = get_field(item, field, list, f"{where}.{field}") or []
            texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if texts:
                self._thoughts += texts
                return

    def _function_call(self, item: Json, where: str) -> None:
        """Engines answer 400 to arguments that are not JSON, such as those of a call that was cut off."""
        arguments = get_field(item, "arguments", str, f"{where}.arguments") or "{}"
        if not self._is_object(arguments):
            arguments = orjson.dumps({INVALID: arguments}).decode()
        self._call(item, where, tool_name(item, where), arguments)

    def _is_object(self, arguments: str) -> bool:
        """Returns True unchecked once the arguments of all calls are too large to parse."""
        short = len(arguments) < SHORT
        self._values += len(arguments) // 2 if short else sum(map(arguments.count, "[{,"))
        return self._values > MOST_VALUES or len(arguments) > LONG or is_object(arguments)

    def _custom_call(self, item: Json, where: str) -> None:
        text = get_field(item, "input", str, f"{where}.input")
        self._call(item, where, tool_name(item, where), encode_input(text or ""))

    def _action(self, item: Json, where: str) -> None:
        """From a conversation that began at OpenAI; the tool itself is not offered."""
        kind = item["type"]
        action = get_field(item, ACTIONS[kind], dict, f"{where}.{ACTIONS[kind]}") or {}
        self._call(item, where, kind.removesuffix("_call"), orjson.dumps(action).decode())

    def _call(self, item: Json, where: str, name: str, arguments: str) -> None:
        self._end_user()
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": _call_id(item, where), "type": "function", "function": function})

    def _output(self, item: Json, where: str) -> None:
        self._end_turn()
        parts = read_parts(item.get("output"), f"{where}.output")
        texts = [part["text"] for part in parts if part["type"] == "text"]
        media = [part for part in parts if part["type"] != "text"]
        if media and not texts:
            texts = ["The result follows."]
        self._user += media
        self.messages.append({"role": "tool", "tool_call_id": _call_id(item, where), "content": "\n".join(texts)})

    def _shell_output(self, item: Json, where: str) -> None:
        """Its output is a list of what each command wrote."""
        self._output({**item, "output": orjson.dumps(item.get("output")).decode()}, where)

    def _end_turn(self) -> None:
        """Thoughts that led to nothing are left out."""
        if self._said or self._calls:
            message: Json = {"role": "assistant", "content": "\n\n".join(self._said) if self._said else None}
            if self._thoughts:
                thoughts = "\n\n".join(self._thoughts)
                message |= {"reasoning": thoughts, "reasoning_content": thoughts}  # vLLM's name, and llama-server's
            if self._calls:
                message["tool_calls"] = self._calls
            self.messages.append(message)
        self._thoughts, self._said, self._calls = [], [], []

    def _end_user(self) -> None:
        """Ends the user's turn."""
        if self._user:
            self.messages.append({"role": "user", "content": as_content(self._user)})
            self._user = []

    # Functions of the class: bound methods would refer to their owner, a circle for the garbage collector.
    READERS: ClassVar[dict[str, Callable[[Conversation, Json, str], None]]] = {
        "message": _message,
        "reasoning": _reasoning,
        "function_call": _function_call,
        "custom_tool_call": _custom_call,
        **dict.fromkeys(ACTIONS, _action),
        "function_call_output": _output,
        "custom_tool_call_output": _output,
        "local_shell_call_output": _output,
        "shell_call_output": _shell_output,
        "apply_patch_call_output": _output,
    }


def _call_id(item: Json, where: str) -> str:
    """The output of a local shell call has it as `id`."""
    call_id = get_field(item, "call_id", str, f"{where}.call_id") or get_field(item, "id", str, f"{where}.id")
    if not call_id:
        raise BadRequestError(f"{where}.call_id is missing: it joins a call and its output", param=f"{where}.call_id")
    return str(call_id)


# -- parts of a message ------------------------------------------------------------------------------------------------


def read_parts(content: Any, where: str) -> list[Json]:
    """A message's content, or a tool's output, as the parts of a chat's. Raises BadRequestError."""
    if isinstance(content, str):
        return [as_part(content)]
    if content is None:
        return []
    if not isinstance(content, list):
        raise BadRequestError(f"{where} must be a string or a list of parts", param=where)
    return [_read_part(part, f"{where}.{index}") for index, part in enumerate(content)]


def _read_part(part: Any, where: str) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in TEXT_PARTS:
        return as_part(get_field(part, TEXT_PARTS[kind], str, f"{where}.{TEXT_PARTS[kind]}") or "")
    if kind == "input_image":
        return _image(part, where)
    if kind == "input_file":
        return _file(part, where)
    if kind == "input_audio":
        audio = get_field(part, "input_audio", dict, f"{where}.input_audio") or {}
        return MediaPart({"type": "input_audio", "input_audio": audio}, f"{where}.input_audio")
    raise BadRequestError(f"{where} {unknown(kind, KNOWN_PARTS)}", param=where)


def _image(part: Json, where: str) -> Json:
    where = f"{where}.image_url"
    url = get_field(part, "image_url", str, where)
    if not url:
        raise BadRequestError(f"{where} is missing; send a URL or a data URL: {KEEPS_NO_FILES}", param=where)
    image = {"url": url}
    if part.get("detail") in ("low", "high"):  # what a chat knows besides its default
        image["detail"] = part["detail"]
    return MediaPart({"type": "image_url", "image_url": image}, where)


def _file(part: Json, where: str) -> Json:
    name = get_field(part, "filename", str, f"{where}.filename")
    where = f"{where}.file_data"
    data = get_field(part, "file_data", str, where)
    if not data:
        raise BadRequestError(
            f"{where} is missing; send the file as a data URL: {KEEPS_NO_FILES} and fetches none", param=where
        )
    return MediaPart({"type": "file", "file": {"file_data": data, **({"filename": name} if name else {})}}, where)
