"""What is wrong with a file is an error of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.files.gguf_file import read_gguf


def test_a_file_is_read_or_refused_with_the_commands_error(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    assert read_gguf(path).architecture == "llama"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="is damaged"):
        read_gguf(path)
    with pytest.raises(ModelFileError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")
