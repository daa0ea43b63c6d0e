"""Any other server that speaks OpenAI's API. Nothing is assumed about it, not even the form of its events."""

from __future__ import annotations

from xgen_proxy.dialects import request_rules as shared
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.sse import EventNormaliser


class OpenAI(Dialect):
    name = "openai"
    event_splitter = EventNormaliser
    rules = (shared.MODEL_NAME, shared.INTERNALS, shared.MAX_TOKENS_BEYOND_CONTEXT)
