"""A Llama of random weights with a real tokenizer: some megabytes, seconds to make, and fast on any engine.

    python tests/support/tiny_llama.py TOKENIZER_DIR OUT_DIR

Run it with a Python that has transformers and torch, such as vLLM's. What it writes is noise, except where a grammar
holds it to a form.
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTH, HEADS, LAYERS = 64, 2, 2
CONTEXT = 2048


def make_llama(tokenizer_dir: Path, out: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(out)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    make_llama(Path(sys.argv[1]), Path(sys.argv[2]))
