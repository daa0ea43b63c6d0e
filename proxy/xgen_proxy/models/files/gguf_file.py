"""GGUF files as the commands read them: what is wrong with one is an error of theirs."""

from __future__ import annotations

from pathlib import Path

from xgen_proxy.gguf import header
from xgen_proxy.models.errors import ModelFileError


def read_gguf(path: Path) -> header.GgufFile:
    """Raises ModelFileError for whatever is not a whole GGUF file."""
    try:
        return header.read_gguf(path)
    except header.GgufError as error:
        raise ModelFileError(str(error)) from None
