"""Any other server that speaks OpenAI's API. Nothing is assumed about it, and nothing in it is repaired."""

from __future__ import annotations

from xgen_proxy.dialects import request_rules as shared
from xgen_proxy.dialects.dialect import Dialect


class OpenAI(Dialect):
    name = "openai"
    rules = (shared.MODEL_NAME, shared.INTERNALS)
