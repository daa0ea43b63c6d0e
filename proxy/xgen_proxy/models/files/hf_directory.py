"""Reads a Hugging Face directory: config.json, and the headers of its safetensors files.

https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.values import frozen

MOST_HEADER = 100_000_000  # bytes; safetensors' own limit


@frozen
class HfDirectory:
    """`weights` and `types` (tensors by type) are those of the safetensors files, `size` their bytes."""

    path: Path
    config: Mapping[str, Any]
    weights: int
    weight_bytes: int
    size: int
    types: Counter[str]
    type_bytes: Counter[str]
    chat_templates: Mapping[str, str]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Of the language model, where the model also sees or hears."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config


@frozen
class Tensor:
    """`begin`, `end`: bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_hf_directory(path: Path) -> HfDirectory:
    """Raises ModelFileError if the directory is not a model, or one of its files is missing or damaged."""
    try:
        return _read(path)
    except OSError as error:
        raise ModelFileError(f"cannot read {error.filename or path}: {error.strerror}") from None


def _read(path: Path) -> HfDirectory:
    if not (path / "config.json").is_file():
        raise ModelFileError(f"{path} is not a model: it has no config.json")
    config = read_json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = files_of(index)
        if missing := [file.name for file in files if not file.exists()]:
            raise ModelFileError(f"{path} lacks {', '.join(missing)}; fetch it again")
    if not files:
        raise ModelFileError(f"{path} has no .safetensors files; vLLM and llama.cpp's converter need them")
    types, type_bytes, weights = Counter[str](), Counter[str](), 0
    for file in files:
        for tensor in read_safetensors(file):
            types[tensor.dtype] += 1
            type_bytes[tensor.dtype] += tensor.end - tensor.begin
            weights += math.prod(tensor.shape)
    size = sum(file.stat().st_size for file in files)
    return HfDirectory(path, config, weights, type_bytes.total(), size, types, type_bytes, chat_templates(path))


def files_of(index: Path) -> list[Path]:
    """The files that the index names, beside it: other weights in the directory are not the model's.

    Raises ModelFileError.
    """
    named = read_json(index).get("weight_map")
    names = set(map(str, named.values())) if isinstance(named, dict) else set()
    if not names or any("/" in name for name in names):
        raise ModelFileError(f"{index} is damaged: it names no files of weights; fetch it again")
    return [index.with_name(name) for name in sorted(names)]


def read_safetensors(path: Path) -> list[Tensor]:
    """Its tensors as its header describes them. Raises ModelFileError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER + 1
        if length > min(size - 8, MOST_HEADER):
            raise ModelFileError(f"{path} is not a safetensors file, or is cut short; fetch it again")
        header = file.read(length)
    try:
        tensors = [tensor_of(tensor) for name, tensor in orjson.loads(header).items() if name != "__metadata__"]
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError):
        raise ModelFileError(f"{path} is damaged: its header makes no sense; fetch it again") from None
    end = 8 + length + max((tensor.end for tensor in tensors), default=0)
    if end != size:
        raise ModelFileError(f"{path} is damaged: it has {size:,} bytes, not {end:,}; fetch it again")
    return tensors


def tensor_of(described: Any) -> Tensor:
    """Raises LookupError, TypeError or ValueError for what makes no sense."""
    begin, end = described["data_offsets"]
    dtype, shape = described["dtype"], described["shape"]
    numbers = (begin, end - begin, *shape)
    if not isinstance(dtype, str) or not all(type(each) is int and each >= 0 for each in numbers):
        raise ValueError(described)
    return Tensor(dtype, tuple(shape), begin, end)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelFileError."""
    try:
        data = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelFileError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ModelFileError(f"{path} is damaged: it contains no JSON object")
    return data


def chat_templates(path: Path) -> dict[str, str]:
    """By name; `default` is the one without a name."""
    found: dict[str, str] = {}
    if (path / "tokenizer_config.json").is_file():
        given = read_json(path / "tokenizer_config.json").get("chat_template")
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            found |= {str(each.get("name")): str(each.get("template")) for each in given if isinstance(each, dict)}
    if (path / "chat_template.jinja").is_file():
        found["default"] = (path / "chat_template.jinja").read_text(errors="replace")
    return found
