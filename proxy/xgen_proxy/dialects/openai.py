"""Any other server that speaks OpenAI's API. Nothing is assumed about it, and nothing in it is repaired."""

from __future__ import annotations

from xgen_proxy.dialects import request_rewrites as rewrite
from xgen_proxy.dialects.dialect import Dialect


class OpenAI(Dialect):
    name = "openai"
    rules = (rewrite.MODEL_NAME,)
