"""Pages that the servers themselves gave, and pages that no server should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.documents import ROOT
from xgen_proxy.fleet.details.kv_cache import KvCache, read_kv_cache

PAGES = ROOT / "tests" / "fixtures" / "metrics"
RECORDED = KvCache(
    blocks=728,
    block_size=128,
    tokens=93_184,
    bytes=2**31,
    dtype="auto",
    memory_utilization=0.92,
    offloading_gib=None,
    prefix_caching=True,
    prefix_hit_rate=0.3737,
    preemptions=0,
)
UNKNOWN = KvCache(*[None] * 10)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("vllm-0.26.0-metrics.txt", replace(RECORDED, prefix_hit_rate=0.0)),
        ("vllm-0.32.0-metrics-idle.txt", replace(RECORDED, prefix_hit_rate=None)),
        ("vllm-0.32.0-metrics-loaded.txt", RECORDED),
        ("llama-server-metrics-idle.txt", None),
    ],
)
def test_recorded_pages(page: str, expected: KvCache | None) -> None:
    assert read_kv_cache((PAGES / page).read_bytes()) == expected


def config(**labels: str) -> str:
    return "vllm:cache_config_info{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "} 1.0\n"


def test_engines_of_a_server_are_summed() -> None:
    page = "".join(
        config(engine=str(n), num_gpu_blocks="100", block_size="16", kv_offloading_size="4.5")
        + f'vllm:num_preemptions_total{{engine="{n}"}} {n}\n'
        + f'vllm:prefix_cache_queries_total{{engine="{n}"}} 1000\nvllm:prefix_cache_hits_total{{engine="{n}"}} {n}00\n'
        for n in (1, 2)
    )
    expected = replace(UNKNOWN, blocks=200, block_size=16, tokens=3200, offloading_gib=4.5)
    assert read_kv_cache(page.encode()) == replace(expected, prefix_hit_rate=0.15, preemptions=3)


def test_one_unknown_makes_the_sum_unknown() -> None:
    page = config(num_gpu_blocks="100") + config(num_gpu_blocks="None")
    assert read_kv_cache(page.encode()) == UNKNOWN


@pytest.mark.parametrize("text", ["-1", "1e999", "nan", "inf", "9" * 5000, "", "None", "0x10", "١٢", "1_0", '1\\"2'])
def test_labels_that_are_no_numbers_are_unknown(text: str) -> None:
    page = config(num_gpu_blocks=text, block_size=text, gpu_memory_utilization=text, kv_offloading_size=text)
    assert read_kv_cache(page.encode()) == UNKNOWN


@pytest.mark.parametrize("value", ["-1", "nan", "+Inf", "", "x", "1e999"])
def test_counters_that_are_no_counts_are_unknown(value: str) -> None:
    page = config() + f"vllm:num_preemptions_total {value}\nvllm:prefix_cache_queries_total {value}\n"
    assert read_kv_cache((page + "vllm:prefix_cache_hits_total 1\n").encode()) == UNKNOWN


def test_more_hits_than_queries_are_no_rate() -> None:
    page = config() + "vllm:prefix_cache_queries_total 1\nvllm:prefix_cache_hits_total 2\n"
    assert read_kv_cache(page.encode()) == UNKNOWN


@pytest.mark.parametrize(
    "page",
    [
        b"", b"\n" * 100, b"vllm:cache_config_info", b"vllm:cache_config_infox{} 1", b"# HELP vllm:cache_config_info x",
        b" vllm:num_preemptions_total 3", b"\xff\x00" * 1000, b"external_vllm:num_preemptions_total 3",
    ],
)  # fmt: skip
def test_pages_without_a_cache(page: bytes) -> None:
    assert read_kv_cache(page) is None


def test_a_page_cannot_make_us_work_for_long() -> None:
    """4 MiB, the most that is read of a page: lines without end, and more samples than a server has engines."""
    assert read_kv_cache(b'vllm:cache_config_info{block_size="' + b"1" * 2**22) == UNKNOWN
    many = b"vllm:num_preemptions_total 1\n" * (2**22 // 30)
    found = read_kv_cache(many)
    assert found
    assert found.preemptions == 1024
