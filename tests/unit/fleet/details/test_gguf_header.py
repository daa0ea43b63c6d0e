"""On a real model, and on files that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.gguf_bytes import gguf, key_value, string
from xgen_proxy.dialects.backend_request import ModelFacts
from xgen_proxy.fleet.details.gguf_header import HEADER_BYTES, read_gguf_header

UINT32, INT8, FLOAT32, STRING, ARRAY, UINT64 = 4, 1, 6, 8, 9, 10
LAYERS = key_value("llama.block_count", UINT32, struct.pack("<I", 30))
TOKENS = key_value("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 49_152))


def read(tmp_path: Path, data: bytes) -> ModelFacts | None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return read_gguf_header(path)


def test_every_kind_of_key_is_read_or_passed_over(tmp_path: Path) -> None:
    data = gguf(
        key_value("general.architecture", STRING, string("llama")),
        key_value("general.tags", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("한국어")),
        key_value("general.sizes", ARRAY, struct.pack("<IQ", UINT32, 2) + struct.pack("<II", 1, 2)),
        key_value("general.flag", 7, b"\x01"),
        key_value("llama.rope.freq_base", FLOAT32, struct.pack("<f", 1e4)),
        key_value("llama.context_length", UINT64, struct.pack("<Q", 8192)),
        key_value("llama.embedding_length", UINT32, struct.pack("<I", 576)),
        LAYERS,
        TOKENS,
    )
    assert read(tmp_path, data) == ModelFacts(vocabulary=49_152, context=8192, layers=30, width=576)


def test_what_stands_before_the_damage_is_known(tmp_path: Path) -> None:
    for tail in (
        b"", b"\xff", string("x")[:-1], struct.pack("<Q", 2**63), key_value("x", 99, b""), key_value("x", STRING, b""),
        key_value("x", ARRAY, struct.pack("<IQ", ARRAY, 2**60)),
        key_value("x", ARRAY, struct.pack("<IQ", STRING, 2**60)),
        key_value("x", ARRAY, struct.pack("<IQ", UINT64, 2**63)), key_value("x", UINT32, b"\x01"),
    ):  # fmt: skip
        assert read(tmp_path, gguf(LAYERS, tail, keys=2**63)) == ModelFacts(layers=30), tail


def test_numbers_that_cannot_be_are_unknown(tmp_path: Path) -> None:
    zero = key_value("llama.block_count", UINT32, bytes(4))
    huge = key_value("llama.context_length", UINT64, b"\xff" * 8)
    negative = key_value("llama.embedding_length", INT8, b"\xff")
    assert read(tmp_path, gguf(zero, huge, negative)) == ModelFacts()


@pytest.mark.parametrize("data", [b"", b"GGU", b"GGML" + bytes(100), b"\x7fELF" + bytes(100)])
def test_other_files_are_no_models(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) is None


def test_a_missing_file_is_no_model(tmp_path: Path) -> None:
    assert read_gguf_header(tmp_path / "none.gguf") is None
    assert read_gguf_header(tmp_path) is None


def test_no_more_than_the_first_bytes_are_read(tmp_path: Path) -> None:
    long = key_value("general.license", STRING, string("x" * HEADER_BYTES))
    assert read(tmp_path, gguf(LAYERS, long, TOKENS)) == ModelFacts(layers=30)
