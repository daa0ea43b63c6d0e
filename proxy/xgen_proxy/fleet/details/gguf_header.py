"""The shape of a model, from the first bytes of its GGUF file, since llama.cpp's servers do not report all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xgen_proxy.dialects.backend_request import ModelFacts
from xgen_proxy.gguf.header import MAGIC, LongArray, first_metadata

# The keys about the architecture stand before the vocabulary, which has megabytes. What stands behind it stays unknown.
HEADER_BYTES = 256 * 1024
MOST = 2**31


def read_gguf_header(path: Path) -> ModelFacts | None:
    """None for what is no GGUF file. Does not raise: the file may be anything, and may vanish."""
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
    except OSError:
        return None
    if data[:4] != MAGIC:
        return None
    shape = {key.partition(".")[2]: _number(value) for key, value in first_metadata(data).items()}
    return ModelFacts(
        vocabulary=shape.get("ggml.tokens"),
        context=shape.get("context_length"),
        layers=shape.get("block_count"),
        width=shape.get("embedding_length"),
    )


def _number(value: Any) -> int | None:
    """Of an array its length."""
    if isinstance(value, LongArray | list):
        value = value.length if isinstance(value, LongArray) else len(value)
    return value if type(value) is int and 0 < value < MOST else None
