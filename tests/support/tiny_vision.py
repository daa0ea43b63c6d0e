"""Two ways to give a test server eyes: random weights, some megabytes, seconds to make.

- For vLLM an Idefics 3 of its own with SmolLM2's tokenizer, by a Python that has transformers and torch:
  `python tests/support/tiny_vision.py TOKENIZER_DIR OUT_DIR`. Its text is noise; its API and prompt tokens are real.
- For llama-server a projector (`--mmproj`) that turns images into embeddings of SmolLM2, which answers in words.

llama-server scales an image of any size to 28 × 28 pixels: four patches, and so four tokens. vLLM scales it to tiles
of that size, at most two by two, and a view of the whole, each of four tokens: where Idefics 3 does not split images,
vLLM 0.26 counts no patches for them, and its engine dies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

SIDE, PATCH = 28, 14  # pixels
SCALE = 2  # Idefics 3 joins as many patches in each direction
PATCHES = (SIDE // PATCH) ** 2
WIDTH, HEADS, LAYERS = 64, 2, 2
MEAN, DEVIATION = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
IMAGE = "<image>"
TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
IDEFICS3_TOKENS = [IMAGE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + IMAGE + "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_idefics3(tokenizer_dir: Path, out: Path) -> None:
    """For vLLM: of its models with eyes, one that needs no torchvision. The weights are large enough that another image
    gives other words."""
    import torch
    from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens(IDEFICS3_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.4,
    )  # fmt: skip
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH // SCALE,
    }  # fmt: skip
    config = Idefics3Config(
        vision_config=vision, text_config=text.to_dict(), tie_word_embeddings=True, scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(out)
    image_processor = {
        "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor",
        "do_image_splitting": True, "size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE},
        "image_mean": MEAN, "image_std": DEVIATION,
    }  # fmt: skip
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": PATCHES}
    (out / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (out / "processor_config.json").write_text(json.dumps(processor))


def make_mmproj(path: Path, width: int = 576) -> None:
    """For llama-server, in the shape of LLaVA 1.5's. `width`: of the language model's embeddings; SmolLM2's."""
    import numpy as np
    from gguf import GGUFWriter

    random = np.random.default_rng(1)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 0.05, shape).astype(np.float32)

    writer = GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "embedding_length": WIDTH, "feed_forward_length": 2 * WIDTH, "block_count": LAYERS, "projection_dim": width,
        "attention.head_count": HEADS, "image_size": SIDE, "patch_size": PATCH,
    }.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", MEAN)
    writer.add_array("clip.vision.image_std", DEVIATION)
    tensors = {
        "v.class_embd": weights(WIDTH),
        "v.patch_embd.weight": weights(WIDTH, 3, PATCH, PATCH),
        "v.position_embd.weight": weights(PATCHES + 1, WIDTH),
        "mm.0.weight": weights(width, WIDTH),
        "mm.0.bias": weights(width),
        "mm.2.weight": weights(width, width),
        "mm.2.bias": weights(width),
    }
    for norm in ("v.pre_ln", "v.post_ln", *(f"v.blk.{layer}.ln{n}" for layer in range(LAYERS) for n in (1, 2))):
        tensors |= {f"{norm}.weight": np.ones(WIDTH, np.float32), f"{norm}.bias": np.zeros(WIDTH, np.float32)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors |= {
                f"v.blk.{layer}.{name}.weight": weights(WIDTH, WIDTH),
                f"v.blk.{layer}.{name}.bias": weights(WIDTH),
            }
        tensors |= {
            f"v.blk.{layer}.ffn_up.weight": weights(2 * WIDTH, WIDTH), f"v.blk.{layer}.ffn_up.bias": weights(2 * WIDTH),
            f"v.blk.{layer}.ffn_down.weight": weights(WIDTH, 2 * WIDTH), f"v.blk.{layer}.ffn_down.bias": weights(WIDTH),
        }  # fmt: skip
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    make_idefics3(Path(sys.argv[1]), Path(sys.argv[2]))
