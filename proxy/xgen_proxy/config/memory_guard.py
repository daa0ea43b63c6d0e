"""The settings of the memory guard."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator


class MemoryGuard(BaseModel, extra="forbid"):
    """When a replica is short of memory (fleet/memory/), and what is done about it."""

    enabled: bool = Field(
        False,
        description="Whether short memory changes slots and routes. Off: with short requests vLLM copes better alone.",
    )
    kv_reduce: float = Field(
        0.95, gt=0, le=1, description="At this share of KV cache used a replica holds fewer requests."
    )
    kv_close: float = Field(0.98, gt=0, le=1, description="At this share of KV cache used it gets no new work.")
    ram_reduce: float = Field(
        0.9,
        gt=0,
        le=1,
        description="The same for the memory of its cgroup, or of the machine: for replicas at a loopback address."
        " Beyond 20 GiB only the last 20 count: 0.9 is 2 GiB left.",
    )
    ram_close: float = Field(0.95, gt=0, le=1, description="At this share of that memory it gets no new work.")
    relief: Literal["none", "reset_prefix_cache"] = Field(
        "none",
        description="What a replica that is short of memory is asked for once nothing runs there. vLLM has the route"
        " only with VLLM_SERVER_DEV_MODE=1, and frees nothing that counts as used: it is for caches outside the GPU.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> MemoryGuard:
        if self.kv_reduce > self.kv_close or self.ram_reduce > self.ram_close:
            raise ValueError("kv_reduce and ram_reduce must not be over kv_close and ram_close")
        return self
