"""The dialects by name. A new dialect is a module beside this one and an entry here."""

from __future__ import annotations

from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.dialect import LlamaCppPython
from xgen_proxy.dialects.llama_server import LlamaServer
from xgen_proxy.dialects.openai import OpenAI
from xgen_proxy.dialects.vllm import VLLM

DIALECTS: dict[str, Dialect] = {each.name: each for each in (VLLM(), LlamaServer(), LlamaCppPython(), OpenAI())}
