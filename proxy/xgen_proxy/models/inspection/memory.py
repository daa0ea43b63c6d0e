"""The memory that a model needs at a context and a number of slots; no I/O.

The estimate is for llama.cpp with its defaults: batches of 512 tokens, no flash attention. A test compares it with the
memory of a real one.
"""

from __future__ import annotations

from xgen_proxy.models.inspection.description import Description
from xgen_proxy.values import frozen

BATCH = 512  # tokens that llama.cpp evaluates at once
KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of one number
PROCESS = 60_000_000  # bytes: Python, llama.cpp and its server before a model is loaded
TOKEN = 500  # bytes for each entry of the vocabulary
LEAST_CONTEXT = 512


@frozen
class Memory:
    """In bytes. `compute`: llama.cpp's buffer for the intermediate results of a batch. `kv_cache`: None if the model
    does not tell what it is made of; `total` then lacks it."""

    weights: int
    kv_cache: int | None
    compute: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + (self.kv_cache or 0) + self.compute + self.process


def estimate(model: Description, context: int, slots: int = 1, kv_type: str = "f16") -> Memory:
    """`context`: tokens for each of the `slots` requests that run at once. At most what the model allows is counted."""
    context = min(context, model.context or context)
    per_token = kv_bytes_per_token(model, kv_type)
    return Memory(
        weights=model.weight_bytes,
        kv_cache=None if per_token is None else per_token * context * slots,
        compute=compute_bytes(model, context),
        process=PROCESS + TOKEN * (model.vocabulary or 0),
    )


def kv_bytes_per_token(model: Description, kv_type: str = "f16") -> int | None:
    """Of all layers; None if the model does not tell.

    Layers with a sliding window are counted in full, as llama.cpp's library keeps them; its server keeps the window
    only. MLA is counted uncompressed. So for such models it is an upper bound.
    """
    if model.attention is None:
        return None
    numbers = sum(model.attention.kv_heads) * (model.attention.key_length + model.attention.value_length)
    return round(numbers * KV_BYTES[kv_type])


def compute_bytes(model: Description, context: int) -> int:
    """The scores of each head for each token of the context, their copy as f16, and the mask.

    Not the logits of a whole batch: llama.cpp reserves them, but the memory stays untouched.
    """
    heads = model.attention.heads if model.attention else 0
    return BATCH * context * (4 * heads + 2 * heads + 4) + BATCH * 4 * 3 * (model.width or 0)


def largest_context(model: Description, available: int, slots: int = 1, kv_type: str = "f16") -> int | None:
    """The most tokens for each slot that fit, in steps of 256; None where not even a short context does."""
    low, high = LEAST_CONTEXT, model.context or 131_072
    if estimate(model, low, slots, kv_type).total > available:
        return None
    while high - low >= 256:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if estimate(model, middle, slots, kv_type).total <= available else (low, middle - 1)
    return high if estimate(model, high, slots, kv_type).total <= available else low // 256 * 256
