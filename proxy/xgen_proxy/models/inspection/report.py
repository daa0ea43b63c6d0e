"""inspect(): the description of a model, its memory, and where it fits; for people and as JSON."""

from __future__ import annotations

from pathlib import Path

from xgen_proxy.models.inspection.description import Description, describe
from xgen_proxy.models.inspection.machine import Place, places
from xgen_proxy.models.inspection.memory import Memory, estimate, largest_context
from xgen_proxy.values import frozen

FITS = {True: "fits", False: "DOES NOT FIT", None: "may fit"}


@frozen
class Fit:
    """`fits`: None if all fits but the KV cache, whose size is not known. `largest_context`: the most tokens for each
    slot that fit there; None: the model does not fit at all, or it is not known."""

    place: Place
    fits: bool | None
    largest_context: int | None


@frozen
class Inspection:
    model: Description
    context: int
    slots: int
    kv_type: str
    memory: Memory
    fits: tuple[Fit, ...]


def inspect(path: Path, context: int, slots: int, kv_type: str) -> Inspection:
    """`context`: tokens for each slot. Raises ModelError."""
    model = describe(path)
    memory = estimate(model, context, slots, kv_type)
    fits = tuple(fit_in(place, model, memory, slots, kv_type) for place in places())
    return Inspection(model, min(context, model.context or context), slots, kv_type, memory, fits)


def fit_in(place: Place, model: Description, memory: Memory, slots: int, kv_type: str) -> Fit:
    fits = memory.total <= place.available
    if memory.kv_cache is None:
        return Fit(place, None if fits else False, None)
    return Fit(place, fits, largest_context(model, place.available, slots, kv_type))


def report(found: Inspection) -> str:
    model = found.model
    rows = [
        ("name", model.name),
        ("path", f"{model.path}, {model.format}, {size(model.file_bytes)}"),
        ("architecture", architecture(model)),
        ("vocabulary", count(model.vocabulary, "tokens")),
        ("context", count(model.context, "tokens")),
        ("weights", f"{model.weights / 1e6:,.1f} million, {model.bits_per_weight:.2f} bits each: {model.quantization}"),
        *(
            ("", f"{share.type:8} {share.tensors:4} tensors  {size(share.bytes):>10}  {share.bits_per_weight:.2f} bits")
            for share in model.types
        ),
        ("chat template", template(model)),
        ("memory", memory(found)),
        *((FITS[fit.fits], verdict(found, fit)) for fit in found.fits),
    ]
    return "".join(f"{name:14}{value}\n" for name, value in rows)


def architecture(model: Description) -> str:
    parts = [model.architecture, count(model.layers, "layers"), f"width {count(model.width)}"]
    if model.attention:
        kv_heads = max(model.attention.kv_heads, default=0)
        parts.append(f"{model.attention.heads} heads, {kv_heads} for keys and values")
    if model.experts:
        parts.append(f"{model.experts} experts")
    return ", ".join(parts)


def template(model: Description) -> str:
    if not model.has_chat_template:
        return "none: it is no chat model, or its file lacks the template"
    return {
        True: "yes; it knows tools",
        False: "yes; it knows no tools: tool calls are not to be expected of this model",
        None: "yes; whether it knows tools cannot be told, since it cannot be rendered here",
    }[model.knows_tools]


def memory(found: Inspection) -> str:
    need = found.memory
    slots = f"{found.slots} slots of " if found.slots > 1 else ""
    most = ", the most that the model allows" if found.context == found.model.context else ""
    attention = found.model.attention
    bound = "more than " if attention is None else "at most " if attention.needs_less else ""
    cache = "unknown" if need.kv_cache is None else f"{bound}{size(need.kv_cache)}"
    return (
        f"{bound}{size(need.total)} for {slots}{found.context:,} tokens{most}: weights {size(need.weights)}, "
        f"KV cache ({found.kv_type}) {cache}, compute {size(need.compute)}, "
        f"process {size(need.process)}"
    )


def verdict(found: Inspection, fit: Fit) -> str:
    text = f"{fit.place.name}: {size(fit.place.available)} of {size(fit.place.total)} are free"
    if fit.fits:
        return text
    if fit.fits is None:
        return f"{text}; the file does not tell how large its KV cache is"
    if fit.largest_context is None:
        return f"{text}; use a smaller quantisation (`xgen-proxy models quantize`) or a smaller model"
    return f"{text}; --context {fit.largest_context} would fit, or fewer slots, --kv-type q8_0, a smaller quantisation"


def count(number: int | None, unit: str = "") -> str:
    return f"{'?' if number is None else f'{number:,}'} {unit}".rstrip()


def size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e10 else f"{number / 1e6:,.1f} MB"
