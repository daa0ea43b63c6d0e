"""What was made, for people and as JSON."""

from __future__ import annotations

from typing import Any

from xgen_proxy.models.quantize.quantization import Quantized


def report(result: Quantized) -> str:
    """The file, its size and types, and why tensors have another type than the wanted one."""
    file = result.file
    types = ", ".join(f"{count} {type}" for type, count in file.types().most_common())
    lines = [
        f"{file.path}  {file.size / 1e6:,.1f} MB  {file.bits_per_weight:.2f} bits per weight",
        f"  {len(file.tensors)} tensors: {types}",
    ]
    for fallback, count in result.fallbacks.items():
        lines.append(
            f"  {count} tensors are {fallback.instead} instead of {fallback.wanted}: their rows have {fallback.row} "
            f"weights, no multiple of {fallback.block}"
        )
    return "\n".join(lines) + "\n"


def as_json(result: Quantized) -> dict[str, Any]:
    return {
        "file": str(result.file.path),
        "bytes": result.file.size,
        "bits_per_weight": round(result.file.bits_per_weight, 3),
        "types": dict(result.file.types()),
        "fallbacks": [
            {"wanted": each.wanted, "instead": each.instead, "row": each.row, "block": each.block, "tensors": count}
            for each, count in result.fallbacks.items()
        ],
    }
