"""The messages of a conversation as the messages of a chat.

Chat templates are stricter than Anthropic's API: one system message, first of all; users and assistants in turn; the
results of tools right after their calls. So neighbours of one role become one message, and results come before the
texts beside them.
"""

from __future__ import annotations

from typing import Any

import orjson

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import get_field
from xgen_proxy.translation.chat import REMINDER
from xgen_proxy.translation.content_parts import as_content, as_part
from xgen_proxy.translation.messages.attribution import without_attribution
from xgen_proxy.translation.messages.blocks import (
    Dropped,
    get_text,
    is_of_server,
    read_blocks,
    summary_of,
    texts_of,
    unknown_block,
    user_parts,
)

ALREADY_ERRORS = ("error", "<tool_use_error>")  # Claude Code marks them itself
IMAGE = "[image]"  # in a tool's result; the image follows in the user's turn
BLANK = " \t\r\n"


def chat_messages(system: Any, messages: list[Any], dropped: Dropped, *, strip_attribution: bool) -> list[Json]:
    """Raises BadRequestError, which names the field."""
    texts = [] if system is None else texts_of(system, "system")
    if strip_attribution:
        texts = without_attribution(texts)
    conversation = Conversation(dropped, texts)
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise BadRequestError(f"{where}.role must be user or assistant", param=f"{where}.role")
        if role == "system":
            conversation.add_system(message.get("content"), f"{where}.content")
            continue
        blocks = read_blocks(message.get("content"), f"{where}.content")
        add = conversation.add_user if role == "user" else conversation.add_assistant
        add(blocks, f"{where}.content")
    return conversation.finish()


class Conversation:
    """A turn is collected until one of another role ends it. `dropped` collects the names of what has no place in a
    chat."""

    def __init__(self, dropped: Dropped, system: list[str]) -> None:
        self.dropped = dropped
        self.system = system
        self.messages: list[Json] = []
        self._user: list[Json] = []  # the parts of the user's present turn
        self._summaries: list[str] = []  # of what came before the assistant's present turn
        self._said: list[str] = []  # in that turn, and what it thought and called
        self._thoughts: list[str] = []
        self._calls: list[Json] = []

    def add_system(self, content: Any, where: str) -> None:
        kept = []
        for number, block in enumerate(read_blocks(content, where)):
            if block["type"] == "text":
                kept.append(get_text(block, "text", f"{where}.{number}"))
            else:  # changes of the tools
                self.dropped[block["type"]] = None
        texts = [text for text in kept if text]
        if self.messages or self._user or self._in_turn:
            self._add_parts([as_part(REMINDER.format(text)) for text in texts])
        else:
            self.system += texts

    def add_user(self, blocks: list[Json], where: str) -> None:
        for number, block in enumerate(blocks):
            at = f"{where}.{number}"
            if block["type"] == "tool_result":
                self._add_result(block, at)
            else:
                self._add_parts(user_parts(block, at, self.dropped))

    def _add_parts(self, parts: list[Json]) -> None:
        if parts:
            self._end_turn()
            self._user += parts

    def _add_result(self, block: Json, where: str) -> None:
        """Chats have texts only as results: images follow in the user's turn."""
        id = get_text(block, "tool_use_id", where)
        content = block.get("content")
        texts: list[str] = []
        images: list[Json] = []
        for number, each in enumerate([] if content is None else read_blocks(content, f"{where}.content")):
            if each["type"] == "tool_reference":
                texts.append(get_text(each, "tool_name", f"{where}.content.{number}"))
                continue
            for part in user_parts(each, f"{where}.content.{number}", self.dropped):
                texts.append(part["text"] if part["type"] == "text" else IMAGE)
                images += [part] if part["type"] != "text" else []
        text = "\n".join(texts)
        if get_field(block, "is_error", bool, f"{where}.is_error") and not text.lower().startswith(ALREADY_ERRORS):
            text = f"Error: {text}" if text else "Error"
        self._end_turn()
        self.messages.append({"role": "tool", "tool_call_id": id, "content": text})
        if images:
            self._user += [as_part(f"The images in the result of {id}:"), *images]

    def add_assistant(self, blocks: list[Json], where: str) -> None:
        summaries: list[str] = []
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[Json] = []
        for number, block in enumerate(blocks):
            at, kind = f"{where}.{number}", block["type"]
            if kind == "text":
                texts.append(get_text(block, "text", at))
            elif kind == "tool_use":
                calls.append(_tool_call(block, at))
            elif kind == "thinking":
                thoughts.append(get_text(block, "thinking", at))
            elif summary := summary_of(block):
                summaries.append(summary)
            elif is_of_server(kind):
                self.dropped[kind] = None
            elif kind != "redacted_thinking":  # encrypted
                raise unknown_block(block, at, "text, tool_use, thinking or redacted_thinking")
        if summaries or any(texts) or thoughts or calls:
            self._flush()
            self._summaries += summaries
            self._said += texts
            self._thoughts += thoughts
            self._calls += calls

    @property
    def _in_turn(self) -> bool:
        """Whether the assistant's turn has begun."""
        return bool(self._summaries or self._said or self._thoughts or self._calls)

    def _end_turn(self) -> None:
        """Ends the assistant's turn."""
        if not self._in_turn:
            return
        said = "".join(self._said)
        message: Json = {"role": "assistant", "content": "\n\n".join([*self._summaries, *([said] if said else [])])}
        if self._thoughts:  # llama-server's name, and vLLM's
            message["reasoning_content"] = message["reasoning"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        self.messages.append(message)
        self._summaries, self._said, self._thoughts, self._calls = [], [], [], []

    def _flush(self) -> None:
        """Ends the user's turn."""
        if self._user:
            self.messages.append({"role": "user", "content": as_content(self._user)})
            self._user = []

    def finish(self) -> list[Json]:
        self._end_turn()
        self._flush()
        system = [{"role": "system", "content": "\n\n".join(self.system)}] if self.system else []
        return [*system, *self.messages]


def _tool_call(block: Json, where: str) -> Json:
    arguments = get_field(block, "input", dict, f"{where}.input") or {}
    function = {"name": get_text(block, "name", where), "arguments": orjson.dumps(arguments).decode()}
    return {"id": get_text(block, "id", where), "type": "function", "function": function}


def prefill_flags(last: Json) -> Json:
    """What makes an engine continue the conversation's last message if it is the assistant's, as Anthropic's API does.
    Raises BadRequestError."""
    if last["role"] != "assistant" or not last["content"] or "tool_calls" in last:
        return {}
    if last["content"][-1] in BLANK:
        message = "messages: the text of a final assistant message must not end with white space"
        raise BadRequestError(message, param="messages")
    return {"continue_final_message": True, "add_generation_prompt": False}
