"""GGUF files and Hugging Face directories, described in the same words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tiny_gguf import CONTEXT, LAYERS, TOKENS, WIDTH, tiny_gguf
from tests.unit.models.files.test_hf_directory import safetensors
from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.inspection.description import Attention, describe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}
ATTENTION = Attention(heads=4, kv_heads=(2, 2), key_length=16, value_length=16, sliding_window=None)


def test_a_gguf(tmp_path: Path) -> None:
    found = describe(tiny_gguf(tmp_path / "tiny.gguf", template="{{ tools }}"))
    assert (found.name, found.architecture, found.quantization, found.format) == ("Tiny", "llama", "F16", "GGUF")
    assert (found.vocabulary, found.layers, found.width, found.context) == (len(TOKENS), LAYERS, WIDTH, CONTEXT)
    assert found.attention == ATTENTION
    assert (found.has_chat_template, found.knows_tools) == (True, True)
    assert [(share.type, share.tensors, share.bits_per_weight) for share in found.types] == [
        ("F16", 1 + LAYERS, 16), ("F32", LAYERS, 32),
    ]  # fmt: skip


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    safetensors(tmp_path / "model.safetensors", a=("BF16", [100, 64], 12800))
    found = describe(tmp_path)
    assert (found.architecture, found.quantization, found.bits_per_weight) == ("LlamaForCausalLM", "BF16", 16)
    assert (found.vocabulary, found.layers, found.width, found.context) == (100, 2, 64, 1024)
    assert found.attention == ATTENTION
    assert (found.has_chat_template, found.knows_tools) == (False, False)


def test_attention_that_needs_less_than_all_of_it(tmp_path: Path) -> None:
    windowed = describe(tiny_gguf(tmp_path / "window.gguf", attention__sliding_window=512)).attention
    latent = describe(tiny_gguf(tmp_path / "latent.gguf", attention__kv_lora_rank=32)).attention
    assert windowed == replace(ATTENTION, sliding_window=512)
    assert latent == replace(ATTENTION, latent=32)
    assert windowed is not None
    assert latent is not None
    assert (windowed.needs_less, latent.needs_less, ATTENTION.needs_less) == (True, True, False)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "kv_lora_rank": 32, "sliding_window": None}))
    safetensors(tmp_path / "model.safetensors", a=("BF16", [100, 64], 12800))
    assert describe(tmp_path).attention == latent


def test_the_real_model(gguf: str) -> None:
    found = describe(Path(gguf))
    assert (found.layers, found.width, found.vocabulary, found.context) == (30, 576, 49152, 8192)
    assert found.knows_tools is False
    assert found.quantization == "Q4_1"


def test_a_model_in_parts(tmp_path: Path) -> None:
    first = tiny_gguf(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is missing; fetch it again"):
        describe(first)
    shutil.copy(first, tmp_path / "m-00002-of-00002.gguf")
    found = describe(first)
    assert found.format == "GGUF in 2 parts"
    assert found.file_bytes == 2 * first.stat().st_size


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="`xgen-proxy models list` shows what is there"):
        describe(tmp_path / "none.gguf")
