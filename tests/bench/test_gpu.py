"""What bench/gpu and bench/gpu_kill make of their measurements."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from bench import gpu, gpu_kill


def load(where: str, rotation: int, figure: float, **other: int) -> gpu.Load:
    counts = {"completed": 10, "failed": 0, "short": 0, "prompt_tokens": 2560, **other}
    return gpu.Load(where, 64, rotation, dict.fromkeys(gpu.FIGURES, figure), seconds=1.0, **counts)


def test_ratios_compare_the_runs_of_one_rotation() -> None:
    loads = [load(gpu.DIRECT, 0, 100), load(gpu.THROUGH, 0, 99), load(gpu.THROUGH, 1, 52), load(gpu.DIRECT, 1, 50)]
    assert gpu.ratios(loads, 64, "output_throughput") == [0.99, 1.04]
    assert "1.015 (0.990 to 1.040)" in gpu.table(loads)


def test_other_prompts_and_missing_tokens_give_warnings() -> None:
    same = [load(gpu.DIRECT, 0, 100), load(gpu.THROUGH, 0, 99)]
    assert gpu.warnings(same) == []
    assert "5 tokens less" in gpu.warnings([same[0], load(gpu.THROUGH, 0, 99, short=5)])[0]
    assert "not the same" in gpu.warnings([same[0], load(gpu.THROUGH, 0, 99, prompt_tokens=2559)])[0]


def test_a_level_has_at_least_one_prompt_per_stream() -> None:
    assert gpu.a_level("64:64") == gpu.Level(64, 64)
    for text in ("64:63", "0:1", "64", "a:b"):
        with pytest.raises(argparse.ArgumentTypeError):
            gpu.a_level(text)


def stream(
    arrivals: list[float], *deltas: dict[str, str], finish: str | None = "stop", tail: str = ""
) -> gpu_kill.Stream:
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    events = "".join(f"data: {json.dumps({**head, 'choices': [choice]})}\n\n" for choice in choices)
    body = bytearray(f"{events}{tail}data: [DONE]\n\n".encode())
    return gpu_kill.Stream({"messages": [], "max_tokens": 9}, status=200, body=body, arrivals=arrivals)


ROLE, WORD = {"role": "assistant"}, {"content": " sea"}


def test_a_stall_is_the_longest_silence_after_the_kill() -> None:
    assert stream([0.0, 5.0, 5.5, 8.0, 8.5], WORD).stall(killed=6.0) == 2.0  # not the 5 s before the kill
    assert stream([0.0, 5.0, 9.0], WORD).stall(killed=6.0) == 3.0  # counted from the kill
    assert stream([0.0, 1.0], WORD).stall(killed=6.0) == 0.0


def test_streams_are_checked_and_show_that_they_were_resumed() -> None:
    whole = stream([], ROLE, WORD)
    assert (whole.wrong, whole.continued) == ("", False)
    resumed = stream([], ROLE, WORD, tail=": resumed on llama_cpp@127.0.0.1:1; only\n\n")
    assert (resumed.wrong, resumed.continued) == ("", True)
    assert stream([], ROLE, WORD, ROLE).wrong == "2 role chunks"
    assert stream([], ROLE, WORD, finish=None).wrong == "0 finish_reasons"


def test_text_of_a_model_is_no_comment_of_the_proxy() -> None:
    assert not stream([], ROLE, {"content": " it resumed on time"}).continued
