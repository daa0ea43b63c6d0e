"""Small GGUF files, written by llama.cpp's own library."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy

TOKENS = [f"token {number}" for number in range(100)]
LAYERS, WIDTH, HEADS, KV_HEADS, CONTEXT = 2, 64, 4, 2, 1024


def tiny_gguf(path: Path, *, template: str | None = None, type: type = numpy.float16, **numbers: int) -> Path:
    """A llama of two layers, without the tensors that would make it answer. `numbers`: more of its metadata, with `__`
    for a dot."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_file_type(1)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(CONTEXT)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_array("tiny.short", [1, 2, 3])
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key.replace('__', '.')}", value)
    if template is not None:
        writer.add_chat_template(template)
    generator = numpy.random.default_rng(1)
    writer.add_tensor("token_embd.weight", generator.normal(size=(len(TOKENS), WIDTH)).astype(type))
    for layer in range(LAYERS):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", generator.normal(size=(WIDTH, WIDTH)).astype(type))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", numpy.ones(WIDTH, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
