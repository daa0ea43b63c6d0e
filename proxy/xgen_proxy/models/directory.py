"""The folder of models: where it is, what is in it, and what a name in it means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.files.gguf_file import PART
from xgen_proxy.models.inspection.description import Description, describe
from xgen_proxy.values import frozen

VARIABLE = "XGEN_MODELS_DIR"
DEFAULT = "models"


@frozen
class Entry:
    """A model, or what is wrong with it."""

    path: Path
    size: int
    model: Description | None
    problem: str = ""


def models_folder(given: str | None = None) -> Path:
    return Path(given or os.environ.get(VARIABLE) or DEFAULT).expanduser()


def entries(folder: Path) -> Iterator[Entry]:
    """GGUF files, Hugging Face directories and unfinished downloads, by name. Raises UsageError."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"cannot read the folder {folder} ({error.strerror}); `xgen-proxy models pull` makes ./{DEFAULT}, "
            f"and {VARIABLE} names another folder"
        ) from None
    for path in paths:
        later_part = (found := PART.search(path.name)) and found[1] != "00001"
        if path.name.startswith(".") and path.name.endswith(".part"):
            whole = path.name[1:].rpartition(".part")[0].rpartition(".")[0]
            size = path.lstat().st_size
            yield Entry(path, size, None, f"unfinished download of {whole}; pull it again to go on")
        elif path.is_dir() and not path.name.startswith("."):
            if (path / "config.json").exists() or any(path.glob("*.safetensors")):
                yield entry(path)
        elif path.suffix == ".gguf" and not later_part:
            yield entry(path)


def entry(path: Path) -> Entry:
    try:
        model = describe(path)
    except ModelError as error:
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        return Entry(path, sum(file.stat().st_size for file in files), None, str(error))
    return Entry(path, model.file_bytes, model)


def find_model(name: str) -> Path:
    """A path, or a file or directory of the models folder, with or without `.gguf`. Raises UsageError."""
    folder = models_folder()
    for path in (Path(name).expanduser(), folder / name, folder / f"{name}.gguf"):
        if path.exists():
            return path
    raise UsageError(f"there is no model {name}, here or in {folder}; `xgen-proxy models list` shows what is there")
