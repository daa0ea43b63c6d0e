"""Write a GGUF file's chat template as a tokenizer_config.json, for the proxy's setting `chat_template`.

    python -m backends.llama_cpp.template model.gguf tokenizer_config.json

llama-cpp-python's server does not serve its template, and the proxy needs it to resume on that server a chat that broke
off on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def config_of(model: Path) -> dict[str, Any]:
    """The template and its tokens, as in Hugging Face's file. Raises ValueError if the model has no template."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        raise ValueError(f"{model} has no chat template")
    vocabulary = llama._model

    def token(number: int) -> str | None:
        return vocabulary.token_get_text(number) if number >= 0 else None

    return {
        "chat_template": template,
        "bos_token": token(llama.token_bos()),
        "eos_token": token(llama.token_eos()),
        "add_bos_token": bool(vocabulary.add_bos_token()),
    }


def main() -> None:
    model, target = map(Path, sys.argv[1:])
    try:
        config = config_of(model)
    except ValueError as error:
        sys.exit(str(error))
    target.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
