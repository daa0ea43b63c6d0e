"""The default model of this repository's backends, and a check of the one that the user named.

python -m backends.models          fetches the default model into models/ if it is missing, checks it, prints its path
"""

from __future__ import annotations

import sys
from pathlib import Path

from backends.environment import ROOT
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.files.gguf_file import read_gguf
from xgen_proxy.models.progress import say
from xgen_proxy.models.pull import catalogue

MODELS = ROOT / "models"
DEFAULT = MODELS / catalogue.DEFAULT


def default_model(folder: Path = MODELS) -> Path:
    """The path of the default model, fetched if missing or damaged. Raises ModelError."""
    return catalogue.default_model(folder)


def given_model(path: Path) -> Path:
    """The path of a file that the user named. Raises ModelError if it is no whole GGUF file."""
    path = path.expanduser()
    if not path.is_file():
        raise ModelError(f"there is no model file {path}; correct MODEL=, or omit it for the default model")
    return read_gguf(path).path


def main() -> int:
    try:
        print(default_model())
    except ModelError as error:
        say(f"models: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
