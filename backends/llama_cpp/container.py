"""A llama.cpp server as a container's main process. Its settings are environment variables, which may be empty.

    python -m backends.llama_cpp.container          become the server, on port 8000
    python -m backends.llama_cpp.container fetch    fetch the default model into /models and write its template

ENGINE       llama-cpp-python or llama-server, set by the image
MODEL_FILE   a GGUF file in /models (default: SmolLM2-135M-Instruct, fetched if missing)
MODEL_NAME   the name it is served under
CONTEXT      tokens per request
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
from backends.models import DEFAULT, default_model, given_model
from backends.process import KEPT
from xgen_proxy.models.errors import ModelError

MODELS = Path("/models")
TEMPLATE = Path("/template/tokenizer_config.json")  # the proxy is configured with this path in any case
NO_TEMPLATE = """{"chat_template": "{{ raise_exception('no template is known') }}"}"""


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
    """Fetch the model. For llama-cpp-python also write its chat template, with which the proxy resumes chats."""
    model = model_file()
    TEMPLATE.write_text(NO_TEMPLATE)
    if os.environ["ENGINE"] == "llama-cpp-python":
        subprocess.run([sys.executable, "-m", "backends.llama_cpp.template", model, TEMPLATE], check=False)
    print(f"{model} is there", flush=True)


def serve() -> None:
    """Become the server, with few variables: llama_cpp.server lets many of them override its flags."""
    GENERATED.unlink(missing_ok=True)
    model = model_file()
    name = os.environ.get("MODEL_NAME") or own_name(model)
    context = int(os.environ.get("CONTEXT") or 4096)
    command = COMMANDS[os.environ["ENGINE"]](model, name, PORT, threads(), context, "0.0.0.0")  # noqa: S104
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    os.execve(command[0], command, kept)  # noqa: S606


def threads() -> int:
    """CPUS, or all usable cores but one: more threads than free cores would be ten times slower."""
    return int(float(os.environ.get("CPUS") or 0)) or max(1, usable_cores() - 1)


if __name__ == "__main__":
    main()
