"""GGUF files and Hugging Face directories, described in the same words."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.gguf_bytes import gguf, key_value, string
from tests.support.tiny_gguf import CONTEXT, LAYERS, TOKENS, WIDTH, tiny_gguf
from tests.unit.models.files.test_hf_directory import safetensors
from xgen_proxy.models.errors import ModelError, ModelFileError
from xgen_proxy.models.inspection import description
from xgen_proxy.models.inspection.description import TEMPLATE, Attention, describe
from xgen_proxy.models.inspection.report import inspect, report

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


STRING, ARRAY, U32, I32, U64, F32, BOOL = 8, 9, 4, 5, 10, 6, 7
VALUES = {
    "a string": (STRING, string("x")),
    "true": (BOOL, b"\1"),
    "a fraction": (F32, struct.pack("<f", 1.5)),
    "no number": (F32, struct.pack("<f", math.nan)),
    "0": (U32, struct.pack("<I", 0)),
    "-1": (I32, struct.pack("<i", -1)),
    "2^50": (U64, struct.pack("<Q", 2**50)),
    "2^64 - 1": (U64, struct.pack("<Q", 2**64 - 1)),
    "numbers": (ARRAY, struct.pack("<IQ2i", I32, 2, 3, -4)),
    "strings": (ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("b")),
    "arrays": (ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ2I", U32, 2, 1, 2)),
    "nothing": (ARRAY, struct.pack("<IQ", U32, 0)),
    "many": (ARRAY, struct.pack("<IQ", BOOL, 99_999) + bytes(99_999)),
}
NUMBERS = {
    "block_count": 2, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 8,
    "attention.kv_lora_rank": 8, "context_length": 1024, "feed_forward_length": 128, "expert_count": 2,
    "vocab_size": 100,
}  # fmt: skip
TEXTS = ("general.architecture", "general.name", "general.file_type", "tokenizer.ggml.tokens", TEMPLATE)


@pytest.mark.parametrize("key", [*NUMBERS, *TEXTS])
def test_a_gguf_is_described_or_refused_whatever_its_values_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(description, "knows_tools", lambda templates: None)
    for name, (kind, value) in VALUES.items():
        pairs = {f"llama.{each}": (U32, struct.pack("<I", number)) for each, number in NUMBERS.items()}
        pairs["general.architecture"] = STRING, string("llama")
        pairs[f"llama.{key}" if key in NUMBERS else key] = kind, value
        path = tmp_path / f"{name}.gguf".replace(" ", "-").replace("/", "")
        path.write_bytes(gguf(*(key_value(each, *given) for each, given in pairs.items())))
        check_description(path)


@pytest.mark.parametrize("key", [*CONFIG, "text_config", "quantization_config", "head_dim", "sliding_window"])
@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, "x", [], [None], ["x"], {}, {"a": []}, 2**50, 2**63])
def test_a_directory_is_described_or_refused_whatever_its_values_are(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    safetensors(tmp_path / "model.safetensors", a=("BF16", [100, 64], 12800))
    check_description(tmp_path)


def check_description(path: Path) -> None:
    """It is a description that can be shown, or a ModelError."""
    with contextlib.suppress(ModelError):
        found = inspect(path, 4096, 1, "f16")
        assert found.memory.total > 0
        assert report(found)


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
