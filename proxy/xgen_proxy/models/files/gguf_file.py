"""GGUF files as the commands read them: what is wrong with one is an error of theirs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from xgen_proxy.gguf import header
from xgen_proxy.models.errors import ModelFileError

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def read_gguf(path: Path) -> header.GgufFile:
    """Raises ModelFileError for whatever is not a whole GGUF file."""
    try:
        return header.read_gguf(path)
    except header.GgufError as error:
        raise ModelFileError(str(error)) from None


def read_model(path: Path) -> header.GgufFile:
    """One file or all parts of a split model, as if they were one file. Raises ModelFileError."""
    parts = [read_gguf(part) for part in parts_of(path)]
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return replace(parts[0], path=path, size=sum(part.size for part in parts), tensors=tensors)


def parts_of(path: Path) -> list[Path]:
    """All files of a model that is split over several. Raises ModelFileError if one is missing."""
    found = PART.search(path.name)
    if found is None:
        return [path]
    names = [f"{path.name[: found.start()]}-{part:05}-of-{found[2]}.gguf" for part in range(1, int(found[2]) + 1)]
    parts = [path.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.exists()]:
        raise ModelFileError(f"{path} is one part of a model, and {', '.join(missing)} is missing; fetch it again")
    return parts
