"""Reads importance matrices of llama.cpp's llama-imatrix, in its old format and as GGUF.

https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/quantize.cpp
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xgen_proxy.gguf.header import MAGIC
from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.files.gguf_file import read_gguf

if TYPE_CHECKING:
    import numpy

MOST_ENTRIES = 100_000
SUMS, COUNTS = ".in_sum2", ".counts"


def read_importance(path: Path) -> dict[str, numpy.ndarray[Any, Any]]:
    """The mean squared activation for each column of each tensor. Raises ModelFileError."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from None
    entries = _from_gguf(path) if magic == MAGIC else _from_dat(path)
    if not entries:
        raise ModelFileError(f"{path} is not an importance matrix; llama.cpp's llama-imatrix makes one")
    return entries


def _from_gguf(path: Path) -> dict[str, numpy.ndarray[Any, Any]]:
    import numpy

    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    entries = {}
    for name, sums in tensors.items():
        counts = tensors.get(name.removesuffix(SUMS) + COUNTS)
        if not name.endswith(SUMS) or counts is None or (sums.type, counts.type) != ("F32", "F32"):
            continue
        sum2 = numpy.fromfile(path, "<f4", sums.weights, offset=sums.end - sums.size)
        count = numpy.fromfile(path, "<f4", counts.weights, offset=counts.end - counts.size)
        if not count.size or sum2.size % count.size:
            raise ModelFileError(f"{path} is damaged: {name} and its counts do not match")
        rows = sum2.reshape(count.size, -1)  # one for each expert
        # As llama-quantize does: a column that was never used counts as any other.
        seen = count[:, None] > 0
        means = numpy.where(seen, rows / numpy.where(seen, count[:, None], 1), 1)
        entries[name.removesuffix(SUMS)] = means.astype("<f4").ravel()
    return entries


def _from_dat(path: Path) -> dict[str, numpy.ndarray[Any, Any]]:
    import numpy

    data, at, entries = path.read_bytes(), 4, {}
    try:
        (count,) = struct.unpack_from("<i", data, 0)
        if not 0 < count <= MOST_ENTRIES:
            return {}
        for _ in range(count):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            calls, columns = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            values = numpy.frombuffer(data, "<f4", columns, offset=at)
            entries[name] = values / calls if calls > 0 else values
            at += 4 * columns
    except (struct.error, ValueError) as error:
        raise ModelFileError(f"{path} is not an importance matrix, or is damaged ({error})") from None
    return entries
