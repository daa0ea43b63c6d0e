"""GGUF headers: read as llama.cpp's own library reads them, and refused where they are damaged."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import gguf as library
import pytest

from tests.support.gguf_bytes import gguf, key_value
from tests.support.tiny_gguf import LAYERS, TOKENS, WIDTH, tiny_gguf
from xgen_proxy.gguf.header import TYPES, GgufError, LongArray, first_metadata, read_gguf


def test_the_type_table_is_llama_cpps() -> None:
    ours = {name: (block, size) for name, block, size in TYPES.values()}
    theirs = {type.name: sizes for type, sizes in library.GGML_QUANT_SIZES.items()}
    assert {name: sizes for name, sizes in ours.items() if theirs.get(name, sizes) != sizes} == {}
    names = {type.value: type.name for type in library.GGMLQuantizationType}
    assert {name for number, (name, _, _) in TYPES.items() if names.get(number, name) != name} == set()
    numbers = {name: number for number, (name, _, _) in TYPES.items()}
    assert all(library.GGMLQuantizationType[name] == number for name, number in numbers.items() if name in theirs)


def test_it_agrees_with_llama_cpps_library(gguf: str) -> None:
    ours, theirs = read_gguf(Path(gguf)), library.GGUFReader(gguf)
    assert [(each.name, each.type, each.shape, each.size, each.end) for each in ours.tensors] == [
        (each.name, each.tensor_type.name, tuple(map(int, each.shape)), each.n_bytes, each.data_offset + each.n_bytes)
        for each in theirs.tensors
    ]
    for key, value in ours.metadata.items():
        field = theirs.get_field(key)
        assert field
        if isinstance(value, LongArray):
            assert len(field.data) == value.length
        else:
            assert field.contents() == value


def test_a_file_in_short(tmp_path: Path) -> None:
    file = read_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    assert (file.architecture, file.of_architecture("block_count")) == ("llama", LAYERS)
    assert file.metadata["tokenizer.ggml.tokens"] == LongArray(len(TOKENS))
    assert file.metadata["tiny.short"] == [1, 2, 3]
    assert file.types() == {"F16": 1 + LAYERS, "F32": LAYERS}
    assert file.weights == len(TOKENS) * WIDTH + LAYERS * (WIDTH * WIDTH + WIDTH)
    assert 16 < file.bits_per_weight < 17


def test_figures_for_each_layer_are_kept(tmp_path: Path) -> None:
    numbers = {length: struct.pack(f"<IQ{length}I", 4, length, *range(length)) for length in (65, 4096, 4097)}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(*(key_value(f"numbers.{length}", 9, value) for length, value in numbers.items())))
    found = read_gguf(path).metadata
    assert found["numbers.65"] == list(range(65))
    assert found["numbers.4096"] == list(range(4096))
    assert found["numbers.4097"] == LongArray(4097)


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    end = read_gguf(tmp_path / "tiny.gguf").tensors[-1].end
    cut = tmp_path / "cut.gguf"
    for length in {0, 3, 8, 23, 24, 100, len(whole) // 4, len(whole) // 2, end - 1}:
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError, match=r"cut short|damaged|not a GGUF file"):
            read_gguf(cut)


def test_a_corrupt_header_is_refused_or_read(tmp_path: Path) -> None:
    """Whatever the bytes are, the answer is a file or a GgufError."""
    whole = tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    corrupt, chance = tmp_path / "corrupt.gguf", random.Random(7)
    for _ in range(300):
        data = bytearray(whole)
        at = chance.randrange(4, 2500)
        data[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**60, 2**64 - 1, chance.getrandbits(64)]))
        corrupt.write_bytes(data)
        with contextlib.suppress(GgufError):
            read_gguf(corrupt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>" + bytes(100), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "claims to have"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(GgufError, match=message):
        read_gguf(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")


def test_the_first_bytes_tell_what_stands_in_them(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    whole, metadata = path.read_bytes(), read_gguf(path).metadata
    assert first_metadata(whole) == metadata
    for length in range(0, len(whole), 7):
        found = first_metadata(whole[:length])
        assert found == {key: metadata[key] for key in found}, "a long array is told before it ends"
        assert list(found) == list(metadata)[: len(found)]
    assert first_metadata(b"GGML" + whole[4:]) == {}
