"""A comparison in words: tables of 120 columns at most, and one sentence of advice. Pure: reads the result file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

Row = tuple[str, ...]
KEPT = 0.95  # of the base's top tokens, in every language, for a model that is advised
LONGEST_NAME = 24
WIDTH = 118


def cost_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Size, load time, memory and speed; the first row is the head."""
    yield "model", "MB", "bits/weight", "load, s", "RSS, MB", "without mmap", "prompt tok/s", "generated tok/s"
    for model in result["models"]:
        yield (
            name(model),
            megabytes(model["size_bytes"]),
            f"{model['bits_per_weight']:.2f}",
            ranged(model["load_s_mmap"], 2),
            megabytes(model["rss_bytes_mmap"]["median"]),
            megabytes(model["rss_bytes_no_mmap"]["median"]),
            ranged(model["prompt_tokens_per_s"], 0),
            ranged(model["generated_tokens_per_s"], 1),
        )


def quality_rows(result: dict[str, Any]) -> Iterator[Row]:
    """How far each model is from the base, by text."""
    yield "model", "text", "perplexity", "mean KLD", "99.9 % KLD", "same top token, %", "same answers"
    for model in result["models"]:
        for text, figures in model["texts"].items():
            if text == "all" and len(model["texts"]) == 2:
                continue  # the same as the only text
            is_base = model["name"] == result["base"]
            yield (
                name(model),
                text,
                f"{figures['perplexity']:.2f} ± {figures['perplexity_error']:.2f}",
                "base" if is_base else f"{figures['kld']:.5f} ± {figures['kld_error']:.5f}",
                "" if is_base else f"{figures['kld_99_9']:.3f}",
                "" if is_base else percent(figures),
                "" if is_base else answers(model, text),
            )


def summary_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Size, speed, quality and memory: a line a model."""
    yield "model", "size, MB", "generated tok/s", "same top token, %", "lowest by text, %", "memory, MB"
    for model in result["models"]:
        is_base = model["name"] == result["base"]
        text, share = weakest(model)
        yield (
            name(model),
            megabytes(model["size_bytes"]),
            ranged(model["generated_tokens_per_s"], 1),
            "base" if is_base else percent(model["texts"]["all"]),
            "" if is_base else f"{100 * share:.1f} ({text})",
            megabytes(model["rss_bytes_mmap"]["median"]),
        )


def name(model: dict[str, Any]) -> str:
    shown: str = model["name"]
    return shown if len(shown) <= LONGEST_NAME else f"…{shown[1 - LONGEST_NAME :]}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def ranged(found: dict[str, Any], digits: int) -> str:
    """The median, and the extremes."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}–{found['max']:.{digits}f})"


def percent(figures: dict[str, Any]) -> str:
    return f"{100 * figures['same_top']:.1f} ± {100 * figures['same_top_error']:.1f}"


def answers(model: dict[str, Any], text: str) -> str:
    given = model["answers"]
    found = given.get(text) or (given.get("all") if len(model["texts"]) == 2 else None)
    return f"{found['same']} of {found['of']}" if found else ""


def weakest(model: dict[str, Any]) -> tuple[str, float]:
    """The text in which the model keeps the fewest top tokens, and their share."""
    by_text = {text: figures["same_top"] for text, figures in model["texts"].items() if text != "all"}
    text = min(by_text, key=by_text.__getitem__)
    return text, by_text[text]


def advice(result: dict[str, Any]) -> str:
    """One sentence: the smallest model that keeps enough in every text, and what rules the next smaller one out."""
    [base] = [model for model in result["models"] if model["name"] == result["base"]]
    others = sorted((each for each in result["models"] if each is not base), key=lambda model: model["size_bytes"])
    good = [model for model in others if weakest(model)[1] >= KEPT]
    if not good:
        best = max(others, key=lambda model: weakest(model)[1])
        return (
            f"None keeps {100 * KEPT:.0f} % of {base['name']}'s top tokens in every text: the nearest, {best['name']}, "
            f"has {in_text(best)}."
        )
    chosen = good[0]
    part = 100 * chosen["size_bytes"] / base["size_bytes"]
    size = f"{megabytes(chosen['size_bytes'])} MB, {part:.0f} % of {base['name']}"
    sentence = (
        f"{chosen['name']} ({size}) is the smallest that keeps {100 * KEPT:.0f} % of the top tokens in every text "
        f"(at least {in_text(chosen)})"
    )
    smaller = others[: others.index(chosen)]
    if smaller:
        sentence += "; " + ", ".join(f"{model['name']} has {in_text(model)}" for model in reversed(smaller))
    return f"{sentence}."


def in_text(model: dict[str, Any]) -> str:
    text, share = weakest(model)
    error = model["texts"][text]["same_top_error"]
    return f"{100 * share:.1f} ± {100 * error:.1f} % in {text}"


def method(result: dict[str, Any]) -> str:
    """Explains the figures below the table."""
    used = result["settings"]
    windows = ", ".join(f"{count} of {text}" for text, count in result["texts"].items())
    threads = f"{used['threads']} thread{'s' if used['threads'] > 1 else ''}"
    return textwrap.fill(
        f"Windows of {used['context']} tokens ({windows}), the second half of each scored; KLD: in nats, to "
        f"{result['base']}; ±: standard error. Load and speed: median (minimum–maximum) of {used['repeat']}, in turns, "
        f"on the CPU with {threads}; {used['prompt_tokens']} tokens read, {used['generated_tokens']} generated. "
        f"Answers: greedy, {used['answer_tokens']} tokens.",
        WIDTH,
    )
