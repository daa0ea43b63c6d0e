"""What engines tell about their memory on /metrics, for /models/status: KV cache, prefix cache, preemptions.

The page is read when somebody asks, since the checks of every second read only what routing needs. However often the
status is asked for, an engine is asked once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from typing import Any

from xgen_proxy.errors import UpstreamError
from xgen_proxy.fleet.load import is_count, samples
from xgen_proxy.fleet.replica import Replica

KEPT_S = 1.0
ALL_S = 5.0  # for all replicas; those that were not reached have no status
TIMEOUT_S = 2.0  # a page of a busy vLLM takes up to 0.35 s
AT_ONCE = 32  # replicas
MOST_BYTES = 16_384  # of the line of the configuration, which has 1,500
LABEL = re.compile(rb'(\w{1,64})="([^"\\]{0,256})"')
NUMBERS = {
    "block_size": int,
    "num_gpu_blocks": int,
    "kv_cache_size_tokens": int,
    "gpu_memory_utilization": float,
    "kv_offloading_size": float,
}  # of vllm:cache_config_info

Status = dict[str, Any]


class EngineStatus:
    """The last page of each replica, as a status, for as long as it is fresh."""

    def __init__(self) -> None:
        self._kept: dict[Replica, tuple[float, Status | None]] = {}
        self._lock = asyncio.Lock()

    async def of_each(self, replicas: Iterable[Replica]) -> dict[Replica, Status | None]:
        """None, or no entry, for a replica that has no such page or does not answer."""
        wanted = [each for each in replicas if each.dialect.metrics_path]
        async with self._lock:  # those who ask meanwhile get the same pages
            now = time.monotonic()
            self._kept = {each: kept for each, kept in self._kept.items() if each in wanted and kept[0] > now - KEPT_S}
            missing = [each for each in wanted if each not in self._kept]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ALL_S):
                    for start in range(0, len(missing), AT_ONCE):
                        await asyncio.gather(*map(self._read, missing[start : start + AT_ONCE]))
            return {each: self._kept[each][1] for each in wanted if each in self._kept}

    async def _read(self, replica: Replica) -> None:
        status = await self._ask(replica)
        self._kept[replica] = time.monotonic(), status

    async def _ask(self, replica: Replica) -> Status | None:
        # llama-server, unlike vLLM, wakes up from its sleep to answer.
        if not replica.answers or replica.dialect.metrics_path != replica.dialect.health_path:
            return None
        try:
            status, page = await replica.ask(str(replica.dialect.metrics_path), timeout_s=TIMEOUT_S)
        except UpstreamError:
            return None
        return parse_status(page) if status == 200 else None


def parse_status(page: bytes) -> Status | None:
    """Of a page of vLLM; None for any other page. Whatever is missing or malformed is None."""
    configuration = _configuration(page)
    usage = _total(page, "vllm:kv_cache_usage_perc", mean=True)
    if not configuration and usage is None:
        return None
    queries, hits = (_total(page, f"vllm:prefix_cache_{what}_total") for what in ("queries", "hits"))
    blocks = configuration.get("num_gpu_blocks")
    return {
        "kv_usage": usage,
        "kv_blocks": blocks,
        "kv_blocks_used": None if blocks is None or usage is None else round(blocks * usage),
        "block_size_tokens": configuration.get("block_size"),
        "kv_cache_tokens": configuration.get("kv_cache_size_tokens"),
        "gpu_memory_utilization": configuration.get("gpu_memory_utilization"),
        "kv_offloading_gib": configuration.get("kv_offloading_size"),
        "prefix_cache_hit_rate": round(min(1.0, hits / queries), 4) if queries and hits is not None else None,
        "preemptions": _total(page, "vllm:num_preemptions_total"),
        "process_rss_bytes": _total(page, "process_resident_memory_bytes"),
    }


def _total(page: bytes, name: str, *, mean: bool = False) -> float | None:
    """Over all engines of the server."""
    found = samples(page, name.encode())
    if not found or not all(map(is_count, found)):
        return None
    return sum(found) / len(found) if mean else sum(found)


def _configuration(page: bytes) -> Status:
    """The labels of vLLM's cache_config_info that are numbers."""
    start = page.find(b"\nvllm:cache_config_info{")
    if start < 0:
        return {}
    line = page[start + 1 : start + 1 + MOST_BYTES].partition(b"\n")[0]
    labels = {name.decode(): value.decode("ascii", "replace") for name, value in LABEL.findall(line)}
    found: Status = {}
    for name, number in NUMBERS.items():
        try:
            value = number(labels.get(name, ""))
        except ValueError:
            continue
        if is_count(value):
            found[name] = value
    return found
