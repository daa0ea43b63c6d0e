"""describe(): what a GGUF file or a Hugging Face directory is, in the same words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xgen_proxy.gguf.header import GgufFile, LongArray
from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.files.gguf_file import parts_of, read_gguf
from xgen_proxy.models.files.hf_directory import HfDirectory, read_hf_directory
from xgen_proxy.models.inspection.chat_template import knows_tools
from xgen_proxy.values import frozen

MOST_LAYERS = 10_000
TEMPLATE = "tokenizer.chat_template"
# llama.cpp's numbers for general.file_type: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
FILE_TYPES: Mapping[int | None, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


@frozen
class TypeShare:
    """The tensors of one type."""

    type: str
    tensors: int
    bytes: int
    bits_per_weight: float


@frozen
class Attention:
    """What the KV cache is made of. `kv_heads`: one number for each layer, 0 for a layer without attention. `latent`:
    the width to which MLA, as in DeepSeek's models, compresses the keys and values of a token."""

    heads: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    sliding_window: int | None
    latent: int | None = None

    @property
    def needs_less(self) -> bool:
        """Engines may keep less than all heads of all tokens: only a window in some layers, or what is compressed."""
        return self.sliding_window is not None or self.latent is not None


@frozen
class Description:
    """A model. None: the file does not tell. `knows_tools` is None also where the template cannot be rendered."""

    path: Path
    format: str
    name: str
    architecture: str
    quantization: str
    weights: int
    weight_bytes: int
    file_bytes: int
    bits_per_weight: float
    types: tuple[TypeShare, ...]
    vocabulary: int | None
    layers: int | None
    width: int | None
    feed_forward: int | None
    context: int | None
    experts: int | None
    attention: Attention | None
    has_chat_template: bool
    knows_tools: bool | None


def describe(path: Path) -> Description:
    """Raises ModelError."""
    if path.is_dir():
        return of_directory(read_hf_directory(path))
    if not path.exists():
        raise ModelFileError(f"there is no {path}; `xgen-proxy models list` shows what is there")
    return of_gguf([read_gguf(part) for part in parts_of(path)])


def of_gguf(parts: list[GgufFile]) -> Description:
    file = parts[0]
    tensors = [tensor for part in parts for tensor in part.tensors]
    kinds = sorted({tensor.type for tensor in tensors})
    shares = []
    for kind in kinds:
        same = [tensor for tensor in tensors if tensor.type == kind]
        size = sum(tensor.size for tensor in same)
        weights = max(1, sum(tensor.weights for tensor in same))
        shares.append(TypeShare(kind, len(same), size, 8 * size / weights))
    weights, weight_bytes = sum(part.weights for part in parts), sum(part.weight_bytes for part in parts)
    templates = {name: str(text) for name, text in file.metadata.items() if name.startswith(TEMPLATE) and text}
    templates = {name: text for name, text in templates.items() if name != f"{TEMPLATE}s"}  # the list of their names
    return Description(
        path=file.path,
        format="GGUF" if len(parts) == 1 else f"GGUF in {len(parts)} parts",
        name=str(file.metadata.get("general.name", file.path.stem)),
        architecture=file.architecture,
        quantization=FILE_TYPES.get(number(file.metadata.get("general.file_type")), largest(shares)),
        weights=weights,
        weight_bytes=weight_bytes,
        file_bytes=sum(part.size for part in parts),
        bits_per_weight=8 * weight_bytes / max(1, weights),
        types=tuple(sorted(shares, key=lambda share: -share.bytes)),
        vocabulary=vocabulary_of(file),
        layers=number(file.of_architecture("block_count")),
        width=number(file.of_architecture("embedding_length")),
        feed_forward=number(file.of_architecture("feed_forward_length")),
        context=number(file.of_architecture("context_length")),
        experts=number(file.of_architecture("expert_count")),
        attention=attention_of_gguf(file),
        has_chat_template=bool(templates),
        knows_tools=knows_tools(templates),
    )


def largest(shares: list[TypeShare]) -> str:
    return max(shares, key=lambda share: share.bytes).type if shares else "unknown"


def number(value: Any) -> int | None:
    """One number for the model: the largest, if each layer has its own. None for what is no number of anything."""
    given = value if isinstance(value, list) else [value]
    return max((each for each in given if type(each) is int and each >= 0), default=None)


def layers_of(value: Any, path: Path) -> int | None:
    """Raises ModelFileError for more layers than a model can have."""
    layers = number(value)
    if layers is not None and layers > MOST_LAYERS:
        raise ModelFileError(f"{path} is damaged: it claims to have {layers:,} layers; fetch it again")
    return layers


def vocabulary_of(file: GgufFile) -> int | None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray):
        return tokens.length
    return len(tokens) if isinstance(tokens, list) else number(file.of_architecture("vocab_size"))


def attention_of_gguf(file: GgufFile) -> Attention | None:
    layers, width = (
        layers_of(file.of_architecture("block_count"), file.path),
        number(file.of_architecture("embedding_length")),
    )
    heads = number(file.of_architecture("attention.head_count"))
    if not layers or not width or not heads:
        return None
    per_layer = file.of_architecture("attention.head_count_kv")
    if not isinstance(per_layer, list) or len(per_layer) != layers:
        per_layer = [number(per_layer) or heads] * layers
    elif None in (per_layer := [number(each) for each in per_layer]):
        return None
    return Attention(
        heads=heads,
        kv_heads=tuple(per_layer),
        key_length=number(file.of_architecture("attention.key_length")) or width // heads,
        value_length=number(file.of_architecture("attention.value_length")) or width // heads,
        sliding_window=number(file.of_architecture("attention.sliding_window")),
        latent=number(file.of_architecture("attention.kv_lora_rank")),
    )


def of_directory(directory: HfDirectory) -> Description:
    config: Mapping[str, Any] = directory.text_config
    shares = [
        TypeShare(
            kind, tensors, size, 8 * size / max(1, directory.weights) if len(directory.types) == 1 else bits(kind)
        )
        for kind, tensors in directory.types.items()
        for size in [directory.type_bytes[kind]]
    ]
    given = directory.config.get("architectures")
    architectures = given if isinstance(given, list) and given else [config.get("model_type", "unknown")]
    quantized = directory.config.get("quantization_config") or config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    return Description(
        path=directory.path,
        format="Hugging Face directory",
        name=directory.path.resolve().name,
        architecture=str(architectures[0]),
        quantization=str(method or largest(shares)),
        weights=directory.weights,
        weight_bytes=directory.weight_bytes,
        file_bytes=directory.size,
        bits_per_weight=8 * directory.weight_bytes / max(1, directory.weights),
        types=tuple(sorted(shares, key=lambda share: -share.bytes)),
        vocabulary=number(config.get("vocab_size")),
        layers=number(config.get("num_hidden_layers")),
        width=number(config.get("hidden_size")),
        feed_forward=number(config.get("intermediate_size")),
        context=number(config.get("max_position_embeddings")),
        experts=number(config.get("num_local_experts") or config.get("num_experts")),
        attention=attention_of_config(config, directory.path),
        has_chat_template=bool(directory.chat_templates),
        knows_tools=knows_tools(directory.chat_templates),
    )


def bits(kind: str) -> float:
    """Of a safetensors type: its name ends with it, as in BF16 or F8_E4M3."""
    found = re.match(r"[A-Z]+(\d+)", kind)
    return float(found[1]) if found else 8.0


def attention_of_config(config: Mapping[str, Any], path: Path) -> Attention | None:
    layers, width = layers_of(config.get("num_hidden_layers"), path), number(config.get("hidden_size"))
    heads = number(config.get("num_attention_heads"))
    if not layers or not width or not heads:
        return None
    length = number(config.get("head_dim")) or width // heads
    kv_heads = number(config.get("num_key_value_heads")) or heads
    window, latent = number(config.get("sliding_window")), number(config.get("kv_lora_rank"))
    return Attention(heads, (kv_heads,) * layers, length, length, window, latent)
