"""Result files as `vllm bench serve` and our bench of engines write them, without what costs do not need."""

from __future__ import annotations

from typing import Any

SECONDS = 100.0


def vllm_result(
    goodput: float | None,
    throughput: float | None = None,
    rate: float | str = "inf",
    concurrency: int | None = None,
    tokens: tuple[int, int] = (256, 128),
    failed: int = 0,
    label: str | None = None,
) -> dict[str, Any]:
    served = throughput if throughput is not None else goodput or 0.0
    completed = round(served * SECONDS)
    return {
        "date": "20261126-010203",
        "backend": "openai",
        "label": label,
        "model_id": "models/llama",
        "request_rate": rate,
        "max_concurrency": concurrency,
        "duration": SECONDS,
        "completed": completed,
        "failed": failed,
        "total_input_tokens": completed * tokens[0],
        "total_output_tokens": completed * tokens[1],
        "request_throughput": served,
        "request_goodput": goodput,
        "output_throughput": served * tokens[1],
        "total_token_throughput": served * sum(tokens),
    }


def bench_record(
    subject: str,
    goodput: float | None,
    where: str = "direct",
    streams: int | None = None,
    rate: float | None = None,
    shared_prefix: int = 0,
) -> dict[str, Any]:
    served = goodput or 1.0
    return {
        "subject": subject,
        "where": where,
        "level": {"streams": streams, "share": None, "shared_prefix": shared_prefix},
        "rate": rate,
        "completed": round(served * SECONDS),
        "failed": 0,
        "prompt_tokens": round(served * SECONDS) * 256,
        "seconds": SECONDS,
        "output_tok_s": served * 128,
        "req_s": served,
        "goodput": goodput,
    }
