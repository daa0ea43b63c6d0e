"""A result as `compare` gives it, made by hand."""

from __future__ import annotations

from typing import Any


def result(**kept: tuple[int, float, float]) -> dict[str, Any]:
    """Of a base of 270 MB and the models named: size in MB, top tokens kept in English and in Korean."""
    models = [model("F16", 270, 1, 1), *(model(name, *figures) for name, figures in kept.items())]
    return {
        "base": "F16",
        "settings": {"context": 512, "repeat": 5, "threads": 2, "prompt_tokens": 256, "generated_tokens": 64}
        | {"answer_tokens": 32},
        "texts": {"english": 3, "korean": 4},
        "models": models,
    }


def model(name: str, size: int, english: float, korean: float) -> dict[str, Any]:
    spread = {"median": 12.345, "min": 9.0, "max": 15.5}
    figures = ("prompt_tokens_per_s", "generated_tokens_per_s", "load_s_mmap", "load_s_no_mmap")
    memory = {"median": 300e6, "min": 290e6, "max": 310e6}
    return {
        "name": name,
        "size_bytes": size * 1_000_000,
        "bits_per_weight": 5.25,
        **dict.fromkeys(figures, spread),
        "rss_bytes_mmap": memory,
        "rss_bytes_no_mmap": memory,
        "texts": {"english": text(english), "korean": text(korean), "all": text((english + korean) / 2)},
        "answers": {"english": {"same": 7, "of": 30}, "all": {"same": 9, "of": 50}},
    }


def text(same_top: float) -> dict[str, float]:
    kld = (1 - same_top) / 10
    errors = {"perplexity_error": 0.51, "kld_error": kld / 10, "same_top_error": 0.004}
    return {"perplexity": 17.03, "kld": kld, "kld_99_9": 30 * kld, "same_top": same_top, **errors}
