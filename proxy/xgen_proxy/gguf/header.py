"""Reads the header of a GGUF file. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

llama.cpp's own Python library, gguf, needs 2 to 5 s for the header of a model with 49,152 tokens, since it makes
arrays of each token; this needs 0.1 s, and only the standard library. The tests compare the two.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xgen_proxy.values import frozen

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KEPT_ITEMS = 64  # of an array; of a longer one only the length is kept
KEPT_NUMBERS = 4096  # of an array of numbers: models tell some figures for each layer
MOST_NESTED = 4
MOST_ITEMS = 10_000_000  # keys, tensors, or items of an array
MOST_FIRST_KEYS = 1024

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# number → name, weights in a block, bytes of a block: ggml's type_traits,
# https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml.c
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


class GgufError(Exception):
    """Its text is a sentence for people about a file that is no model, or is damaged."""


class _CutError(Exception):
    """Says what is wrong with the header."""


@frozen
class LongArray:
    """An array of the metadata that was not kept, such as the vocabulary."""

    length: int


@frozen
class Tensor:
    """`shape`: innermost dimension, the row, first. `end`: the file offset behind its last byte."""

    name: str
    type: str
    shape: tuple[int, ...]
    size: int
    end: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@frozen
class GgufFile:
    """The header of a file: its metadata, and its tensors without their weights."""

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def of_architecture(self, key: str) -> Any:
        """Such as `block_count`: the value of `llama.block_count` for the architecture llama, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def weights(self) -> int:
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / max(1, self.weights)

    def types(self) -> Counter[str]:
        """Tensors by type."""
        return Counter(tensor.type for tensor in self.tensors)


def read_gguf(path: Path) -> GgufFile:
    """Raises GgufError for whatever is not a whole GGUF file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise GgufError(f"{path} is not a GGUF file: it has {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except OSError as error:
        raise GgufError(f"cannot read {path}: {error.strerror}") from None
    except (_CutError, UnicodeDecodeError, struct.error) as error:
        raise GgufError(f"{path} is damaged ({error}); fetch or make it again") from None


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    if data[:4] != MAGIC:
        raise GgufError(f"{path} is not a GGUF file; llama.cpp serves GGUF only")
    header = _Header(data)
    version = header.number("I")
    if version not in VERSIONS:
        raise GgufError(f"{path} is a GGUF file of version {version}; versions 2 and 3 are known")
    tensor_count, key_count = header.count(), header.count()
    metadata = dict(header.pairs(key_count))
    described = [header.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _CutError(f"an alignment of {alignment!r}")
    start = -(-header.at // alignment) * alignment
    tensors = tuple(
        Tensor(name, type, shape, size, start + offset + size) for name, type, shape, size, offset in described
    )
    end = max((tensor.end for tensor in tensors), default=0)
    if end > len(data):
        raise GgufError(
            f"{path} is cut short: it has {len(data):,} bytes of {end:,}; an interrupted download? Fetch it again"
        )
    return GgufFile(path, len(data), metadata, tensors)


def first_metadata(data: bytes) -> dict[str, Any]:
    """The metadata in the first bytes of a file, as far as it can be read. Never raises."""
    found: dict[str, Any] = {}
    with contextlib.suppress(_CutError, UnicodeDecodeError, struct.error):
        header = _Header(data)
        _, _, keys = header.number("I"), header.number("Q"), header.number("Q")
        if data[:4] == MAGIC:
            found.update(header.pairs(min(keys, MOST_FIRST_KEYS)))
    return found


def _kept(type: int) -> int:
    return KEPT_NUMBERS if type in SCALARS else KEPT_ITEMS


class _Header:
    """Reads values one after another; no length is believed that the file cannot hold."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self.at = 4

    def _take(self, count: int) -> int:
        at = self.at
        if count > len(self.data) - at:
            raise _CutError("its header ends early")
        self.at = at + count
        return at

    def number(self, format: str) -> Any:
        (value,) = struct.unpack_from(f"<{format}", self.data, self._take(struct.calcsize(f"<{format}")))
        return value

    def count(self) -> int:
        count: int = self.number("Q")
        if count > MOST_ITEMS:
            raise _CutError(f"it claims to have {count:,} items")
        return count

    def text(self) -> str:
        length: int = self.number("Q")
        at = self._take(length)
        return self.data[at : at + length].decode()

    def pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        """Keys and values. A LongArray is yielded before the items of its array are skipped."""
        for _ in range(count):
            key, type = self.text(), self.number("I")
            if type != ARRAY:
                yield key, self.value(type)
                continue
            items, length = self.number("I"), self.count()
            if length <= _kept(items):
                yield key, self._items(items, length, 1)
            else:
                yield key, LongArray(length)
                self._pass(items, length, 1)

    def value(self, type: int, nested: int = 0) -> Any:
        if type in SCALARS:
            return self.number(SCALARS[type])
        if type == STRING:
            return self.text()
        if type == ARRAY and nested < MOST_NESTED:
            items, length = self.number("I"), self.count()
            if length <= _kept(items):
                return self._items(items, length, nested + 1)
            self._pass(items, length, nested + 1)
            return LongArray(length)
        raise _CutError(f"a value of the unknown type {type}")

    def _items(self, type: int, length: int, nested: int) -> list[Any]:
        return [self.value(type, nested) for _ in range(length)]

    def _pass(self, type: int, length: int, nested: int) -> None:
        if type in SCALARS:
            self._take(length * struct.calcsize(f"<{SCALARS[type]}"))
        elif type == STRING:
            for _ in range(length):
                self._take(self.number("Q"))
        else:
            for _ in range(length):
                self.value(type, nested)

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, size in bytes, offset in the data."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > 8:
            raise _CutError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        number, offset = self.number("I"), self.number("Q")
        if number not in TYPES:
            raise _CutError(f"the tensor {name[:80]!r} has the unknown type {number}")
        type, block, block_bytes = TYPES[number]
        return name, type, shape, math.prod(shape) // block * block_bytes, offset
