"""A llama.cpp server as a container's main process. Its settings come from the environment, and may be empty.

    python -m backends.llama_cpp.container          becomes the server, on port 8000
    python -m backends.llama_cpp.container fetch    gets the default model into /models and the template out of it

ENGINE       llama-cpp-python or llama-server; the image says which it holds
MODEL_FILE   a GGUF file in /models (default: SmolLM2-135M-Instruct, fetched where it is missing)
MODEL_NAME   what clients call it
CONTEXT      tokens of a request
CPUS         cores to compute with; 0 or unset: all but one
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from backends.environment import usable_cores
from backends.healthcheck import GENERATED, PORT
from backends.local import COMMANDS, own_name
from backends.models import DEFAULT, ModelError, default_model, given_model
from backends.process import KEPT

MODELS = Path("/models")
TEMPLATE = Path("/template/tokenizer_config.json")  # the proxy is told this name, whatever comes of it
NO_TEMPLATE = """{"chat_template": "{{ raise_exception('none is known') }}"}"""


def main() -> None:
    try:
        if sys.argv[1:] == ["fetch"]:
            fetch()
        else:
            serve()
    except ModelError as error:
        sys.exit(f"llama.cpp: {error}")


def model_file() -> Path:
    """Raises ModelError."""
    name = os.environ.get("MODEL_FILE") or DEFAULT.name
    return default_model(MODELS) if name == DEFAULT.name else given_model(MODELS / name)


def fetch() -> None:
    """llama-server renders the template itself; llama-cpp-python leaves it to the proxy to go on with a chat."""
    model = model_file()
    TEMPLATE.write_text(NO_TEMPLATE)
    if os.environ["ENGINE"] == "llama-cpp-python":
        subprocess.run([sys.executable, "-m", "backends.llama_cpp.template", model, TEMPLATE], check=False)
    print(f"{model} is there", flush=True)


def serve() -> None:
    """With few variables: llama_cpp.server takes many as settings, over its own flags."""
    GENERATED.unlink(missing_ok=True)
    model = model_file()
    name = os.environ.get("MODEL_NAME") or own_name(model)
    context = int(os.environ.get("CONTEXT") or 4096)
    command = COMMANDS[os.environ["ENGINE"]](model, name, PORT, threads(), context, "0.0.0.0")  # noqa: S104
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    os.execve(command[0], command, kept)  # noqa: S606


def threads() -> int:
    """More than there are free cores would make it ten times slower."""
    return int(float(os.environ.get("CPUS") or 0)) or max(1, usable_cores() - 1)


if __name__ == "__main__":
    main()
