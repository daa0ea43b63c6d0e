"""vLLM's KV cache, from a /metrics page that the health check has read. Does no I/O.

https://docs.vllm.ai/en/latest/design/metrics.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from xgen_proxy.values import frozen

CONFIG = b"vllm:cache_config_info"
QUERIES, HITS = b"vllm:prefix_cache_queries_total", b"vllm:prefix_cache_hits_total"
PREEMPTIONS = b"vllm:num_preemptions_total"
MAX_SAMPLES = 1024  # of one name; vLLM has one for each engine of a server
MAX_LINE_BYTES = 16_384  # of CONFIG, whose labels are all of vLLM's settings for the cache: 1,300 in 0.32
LABEL = re.compile(rb'(\w{1,64})="([^"\\]{0,64})"')
WHOLE = re.compile(rb"\d{1,15}")
DECIMAL = re.compile(rb"\d{1,15}(\.\d{1,15})?")


@frozen
class KvCache:
    """None where the page does not say; unknown is never 0.

    `blocks`, `tokens`, `bytes`: what the cache can hold, the sum over a server's engines. `block_size`: tokens of a
    block. `memory_utilization`: --gpu-memory-utilization. `offloading_gib`: --kv-offloading-size. `prefix_hit_rate`:
    the share of prompt tokens found in the cache since the server started. `preemptions`: running requests that lost
    their blocks since then.
    """

    blocks: int | None
    block_size: int | None
    tokens: int | None
    bytes: int | None
    dtype: str | None
    memory_utilization: float | None
    offloading_gib: float | None
    prefix_caching: bool | None
    prefix_hit_rate: float | None
    preemptions: int | None


def read_kv_cache(page: bytes) -> KvCache | None:
    """None for a page that has nothing of it, as that of any other engine."""
    configs = [dict(LABEL.findall(line)) for line in _samples(page, CONFIG)]
    queries, hits, preemptions = (_sum(page, name) for name in (QUERIES, HITS, PREEMPTIONS))
    if not configs and preemptions is None:
        return None
    first = configs[0] if configs else {}
    size = _whole(first.get(b"block_size"))
    blocks = _total([_whole(each.get(b"num_gpu_blocks")) for each in configs])
    tokens = _total([_whole(each.get(b"kv_cache_size_tokens")) for each in configs])
    if tokens is None and blocks is not None and size is not None:  # an older vLLM does not say
        tokens = blocks * size
    return KvCache(
        blocks=blocks,
        block_size=size,
        tokens=tokens,
        bytes=_total([_whole(each.get(b"kv_cache_memory_bytes")) for each in configs]),
        dtype=_word(first.get(b"cache_dtype")),
        memory_utilization=_decimal(first.get(b"gpu_memory_utilization")),
        offloading_gib=_decimal(first.get(b"kv_offloading_size")),
        prefix_caching={b"True": True, b"False": False}.get(first.get(b"enable_prefix_caching", b"")),
        prefix_hit_rate=round(hits / queries, 4) if queries and hits is not None and hits <= queries else None,
        preemptions=None if preemptions is None else int(preemptions),
    )


def _samples(page: bytes, name: bytes) -> Iterator[bytes]:
    """The lines of a metric without its name. Searches for it, since a page of vLLM has 70 KB."""
    page, name = b"\n" + page, b"\n" + name
    at = page.find(name)
    for _ in range(MAX_SAMPLES):
        if at < 0:
            return
        after = at + len(name)
        end = page.find(b"\n", after, after + MAX_LINE_BYTES)
        if page[after : after + 1] in (b"{", b" "):
            yield page[after : end if end >= 0 else after + MAX_LINE_BYTES]
        at = page.find(name, after)


def _sum(page: bytes, name: bytes) -> float | None:
    """Of a counter, over a server's engines. None if a sample is missing or no number from 0 up."""
    total: float | None = None
    for line in _samples(page, name):
        value = line.rpartition(b"}")[2].split()[:1]  # a timestamp may follow
        try:
            number = float(value[0]) if value else math.nan
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            return None
        total = (total or 0.0) + number
    return total


def _total(values: list[int | None]) -> int | None:
    """None if one is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _whole(label: bytes | None) -> int | None:
    return int(label) if label is not None and WHOLE.fullmatch(label) else None


def _decimal(label: bytes | None) -> float | None:
    return float(label) if label is not None and DECIMAL.fullmatch(label) else None


def _word(label: bytes | None) -> str | None:
    return label.decode("ascii", "replace") if label is not None else None
