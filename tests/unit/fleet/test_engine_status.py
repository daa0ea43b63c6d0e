"""The page of a vLLM as a status, also where the page is hostile."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.fleet.engine_status import parse_status

PAGES = Path(__file__).parents[2] / "fixtures" / "metrics"


def page(name: str) -> bytes:
    return (PAGES / name).read_bytes()


def test_a_loaded_vllm() -> None:
    status = parse_status(page("vllm-0.32.0-metrics-loaded.txt"))
    assert status == {
        "kv_usage": pytest.approx(0.0055, abs=1e-4),
        "kv_blocks": 728,
        "kv_blocks_used": 4,
        "block_size_tokens": 128,
        "kv_cache_tokens": 93184,
        "gpu_memory_utilization": 0.92,
        "kv_offloading_gib": None,
        "prefix_cache_hit_rate": 0.3737,
        "preemptions": 0,
        "process_rss_bytes": 808710144,
    }


def test_an_older_vllm() -> None:
    status = parse_status(page("vllm-0.26.0-metrics.txt"))
    assert status is not None
    assert (status["block_size_tokens"], status["prefix_cache_hit_rate"]) == (128, 0.0)


def test_another_engine_has_no_such_status() -> None:
    assert parse_status(page("llama-server-metrics-idle.txt")) is None
    assert parse_status(b"") is None
    assert parse_status(b"<html>" * 1000) is None


INFO = b'\nvllm:cache_config_info{block_size="%b",num_gpu_blocks="%b"} 1.0\n'


@pytest.mark.parametrize("number", [b"nan", b"-1", b"inf", b"1e999", b"", b"x", b"9" * 300, b"1\\n2"])
def test_numbers_that_are_none(number: bytes) -> None:
    status = parse_status(INFO % (b"16", number) + b"vllm:kv_cache_usage_perc{} 0.5\n")
    assert status is not None
    assert (status["block_size_tokens"], status["kv_blocks"], status["kv_blocks_used"]) == (16, None, None)


@given(st.binary(max_size=400), st.sampled_from(["vllm-0.32.0-metrics-loaded.txt"]), st.integers(0, 60_000))
def test_any_page_is_read(junk: bytes, name: str, at: int) -> None:
    whole = page(name)
    parse_status(whole[:at] + junk + whole[at:])
    parse_status(b"\nvllm:cache_config_info{" + junk)
