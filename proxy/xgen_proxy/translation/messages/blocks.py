"""The content blocks of a message as the parts of a chat message."""

from __future__ import annotations

from typing import Any

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import get_field
from xgen_proxy.translation.content_parts import as_part
from xgen_proxy.translation.media_part import MediaPart

# Blocks of tools that run at Anthropic, in conversations that began there. Most are encrypted.
SERVER_BLOCKS = ("server_tool_use", "mcp_tool_use", "mcp_tool_result", "container_upload", "fallback", "compaction")
SERVER_RESULTS = "_tool_result"  # web_search_tool_result, code_execution_tool_result, …
UNREADABLE = "[a document that this model cannot read]"
Dropped = dict[str, None]  # an ordered set


def read_blocks(content: Any, where: str) -> list[Json]:
    """The blocks of a message's content; a string is one text. Raises BadRequestError."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequestError(f"{where} must be a string or an array of blocks", param=where)
    for number, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            at = f"{where}.{number}"
            raise BadRequestError(f"{at} must be an object with a type, such as text", param=at)
    return content


def get_text(block: Json, field: str, where: str) -> str:
    """A field that must be there. Raises BadRequestError."""
    name = f"{where}.{field}"
    value: str | None = get_field(block, field, str, name)
    if value is None:
        raise BadRequestError(f"{name} is missing; send a string", param=name)
    return value


def texts_of(content: Any, where: str) -> list[str]:
    """Of content that may have texts only, such as a system prompt."""
    found = []
    for number, block in enumerate(read_blocks(content, where)):
        if block["type"] != "text":
            raise unknown_block(block, f"{where}.{number}", "text")
        found.append(get_text(block, "text", f"{where}.{number}"))
    return [text for text in found if text]


def user_parts(block: Json, where: str, dropped: Dropped) -> list[Json]:
    """One block of a user's turn, or of a tool's result. Raises BadRequestError."""
    kind = block["type"]
    if kind == "text":
        text = get_text(block, "text", where)
        return [as_part(text)] if text else []
    if kind == "image":
        return [MediaPart({"type": "image_url", "image_url": {"url": image_url(block, where)}}, f"{where}.source")]
    if kind == "document":
        return _document(block, where, dropped)
    if kind == "search_result":
        heading = f"{get_text(block, 'title', where)} ({get_text(block, 'source', where)})"
        return [as_part("\n".join([heading, *texts_of(block.get("content"), f"{where}.content")]))]
    if is_of_server(kind):
        dropped[kind] = None
        return []
    raise unknown_block(block, where, "text, image, document, search_result or tool_result")


def is_of_server(kind: str) -> bool:
    return kind in SERVER_BLOCKS or kind.endswith(SERVER_RESULTS)


def summary_of(block: Json) -> str:
    """What a compaction block says about the conversation before it, "" if it failed or the block is another.
    https://docs.claude.com/en/docs/build-with-claude/compaction"""
    content = block.get("content") if block["type"] == "compaction" else None
    return content.strip() if isinstance(content, str) else ""


def unknown_block(block: Json, where: str, known: str) -> BadRequestError:
    return BadRequestError(f"{where}.type must be {known}, not {quoted(block['type'])}", param=f"{where}.type")


def image_url(block: Json, where: str) -> str:
    """A data URL, or the client's own. Raises BadRequestError."""
    where = f"{where}.source"
    source: Json = get_field(block, "source", dict, where) or {}
    kind = source.get("type")
    if kind == "url":
        return get_text(source, "url", where)
    if kind == "base64":
        return f"data:{get_text(source, 'media_type', where)};base64,{get_text(source, 'data', where)}"
    raise BadRequestError(f"{where} must be of type base64 or url; there is no file storage here", param=where)


def _document(block: Json, where: str, dropped: Dropped) -> list[Json]:
    """A document of text or blocks. A sentence stands for a PDF, which no engine reads, so that the conversation goes
    on."""
    where = f"{where}.source"
    source: Json = get_field(block, "source", dict, where) or {}
    kind = source.get("type")
    title = [as_part(f"{block[name]}") for name in ("title", "context") if isinstance(block.get(name), str)]
    if kind == "text":
        return [*title, as_part(get_text(source, "data", where))]
    if kind == "content":
        blocks = read_blocks(source.get("content"), f"{where}.content")
        parts = [user_parts(each, f"{where}.content.{number}", dropped) for number, each in enumerate(blocks)]
        return [*title, *(part for several in parts for part in several)]
    if kind not in ("base64", "url", "file"):
        raise BadRequestError(f"{where} must be of type text, content, base64 or url", param=where)
    dropped["document"] = None
    return [*title, as_part(UNREADABLE)]
