"""What is wrong with a file is an error of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from numpy import float16, float32

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.files.gguf_file import read_gguf, read_model


def test_a_file_is_read_or_refused_with_the_commands_error(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    assert read_gguf(path).architecture == "llama"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelFileError, match="is damaged"):
        read_gguf(path)
    with pytest.raises(ModelFileError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")


def test_a_split_model_is_all_its_parts(tmp_path: Path) -> None:
    """compare takes its size, its bits and the memory that it needs from there."""
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    first, second = (
        read_gguf(tiny_gguf(part, type=type)) for part, type in zip(parts, (float16, float32), strict=True)
    )
    found = read_model(parts[0])
    assert found.size == first.size + second.size
    assert found.types() == first.types() + second.types()
    assert first.bits_per_weight < found.bits_per_weight < second.bits_per_weight
    assert (found.path, found.metadata) == (parts[0], first.metadata)
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is missing; fetch it again"):
        read_model(parts[0])
