"""Importance matrices, in both of llama.cpp's formats."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy
import pytest

from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.quantize.importance import read_importance

NAME = "blk.0.attn_q.weight"


def old_format(path: Path, calls: int = 4) -> Path:
    name = NAME.encode()
    values = struct.pack("<3f", 4, 8, 12)
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", calls, 3) + values)
    return path


def test_the_old_format(tmp_path: Path) -> None:
    found = read_importance(old_format(tmp_path / "imatrix.dat"))
    assert {name: values.tolist() for name, values in found.items()} == {NAME: [1, 2, 3]}


def test_gguf_with_experts_of_which_one_was_never_used(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_tensor(f"{NAME}.in_sum2", numpy.array([[4, 8, 12], [0, 0, 0]], numpy.float32))
    writer.add_tensor(f"{NAME}.counts", numpy.array([[4], [0]], numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_importance(path)
    assert {name: values.tolist() for name, values in found.items()} == {NAME: [1, 2, 3, 1, 1, 1]}


@pytest.mark.parametrize("content", [b"", b"no", struct.pack("<ii", 1, 2**30), struct.pack("<i", -1), b"x" * 50])
def test_what_is_no_importance_matrix(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is not an importance matrix"):
        read_importance(path)


def test_a_cut_one(tmp_path: Path) -> None:
    path = old_format(tmp_path / "imatrix.dat")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ModelFileError, match="is damaged"):
        read_importance(path)
    with pytest.raises(ModelFileError, match="cannot read"):
        read_importance(tmp_path / "none")
