"""Convert a GGUF file to a Hugging Face model directory, the only format that vLLM serves.

    .venv-vllm/bin/python backends/vllm/convert.py models/model.gguf models/model-hf

Weights become bfloat16. The directory appears complete, and only if the converted model answers a question.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

CONTEXT = 8192  # tokens; a GGUF file does not give it to the tokenizer
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def load(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer. Weights are dequantised: quantised ones cannot be saved."""
    name = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**name, model_max_length=CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(
        **name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    return model, tokenizer


def answer(directory: Path) -> str:
    """The saved model's answer to QUESTION."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def convert(gguf: Path, target: Path) -> None:
    """Convert the file. Raises RuntimeError if the converted model does not answer."""
    model, tokenizer = load(gguf)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch, "made")
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        text = answer(made)
        if ANSWER not in text:
            raise RuntimeError(f"the converted model does not answer: {QUESTION} -> {text!r}")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
