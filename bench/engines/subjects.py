"""The engines under comparison: how each is started, and what the load generator must tell it.

`{port}` in a command becomes a free port. Commands use the same weights; llama.cpp's are a GGUF, quantised.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends import local

SERVER = str(Path(__file__).with_name("transformers_server.py"))
NAME = "m"  # the model's name in every server
CONTEXT = 2048
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Server:
    """A command whose `{port}` is filled in when it starts, and its environment."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """An engine as one or more servers.

    `extra`: fields that the load generator adds to each request. `gauges`: the prefix of its metrics of running and
    waiting requests. `direct`: whether the load generator can reach it without the proxy.
    """

    name: str
    dialect: str
    weights: str
    servers: tuple[Server, ...]
    ready: str = "/health"
    extra: Mapping[str, Any] = field(default_factory=dict)
    gauges: str | None = None
    knob: str = ""
    direct: bool = True

    def described(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "dialect": self.dialect,
            "weights": self.weights,
            "commands": [shlex.join(server.command) for server in self.servers],
            "environment": [dict(server.env) for server in self.servers],
            "extra": dict(self.extra),
            "knob": self.knob,
        }


def threads(options: argparse.Namespace) -> int:
    return int(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))


def transformers(options: argparse.Namespace, *flags: str) -> tuple[Server, ...]:
    cpu = [] if options.gpu else ["--threads", str(threads(options))]
    random = ["--random"] if options.random else []
    command = [*shlex.split(options.vllm_python), "-P", SERVER, str(options.hf), "--name", NAME, "--port", "{port}"]
    return (Server((*command, *cpu, *random, *flags), OFFLINE),)


def one_at_a_time(options: argparse.Namespace) -> Subject:
    weights = f"{options.hf.name}, bf16"
    return Subject("transformers", "openai", weights, transformers(options), gauges="transformers")


def continuous(options: argparse.Namespace) -> Subject:
    # On a CPU it cannot tell how much memory the cache may take.
    sizes = () if options.gpu else ("--num-blocks", "64", "--max-batch-tokens", "512")
    servers = transformers(options, "--continuous", *sizes)
    weights = f"{options.hf.name}, bf16"
    return Subject("transformers-continuous", "openai", weights, servers, gauges="transformers")


def vllm_server(options: argparse.Namespace, *flags: str, **env: str) -> Server:
    """vLLM as --vllm starts it. Flags given here win."""
    given = shlex.split(options.vllm)
    if given[1:2] != ["serve"] and "serve" not in given:
        given += ["serve", str(options.hf)]
    command = [*given, "--served-model-name", NAME, "--host", "127.0.0.1", "--port", "{port}"]
    if not options.gpu:
        command += ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64", "--enforce-eager"]
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads(options)),
            **env,
        }
    if not any("prefix-caching" in flag for flag in (*given, *flags)):
        command.append("--no-enable-prefix-caching")  # direct and proxied runs have the same prompts
    return Server((*command, *flags), {**OFFLINE, **env})


def vllm(options: argparse.Namespace) -> Subject:
    return Subject("vllm", "vllm", f"{options.hf.name}, bf16", (vllm_server(options),), gauges="vllm")


def no_end(options: argparse.Namespace) -> dict[str, Any]:
    """llama-cpp-python knows no ignore_eos: the tokens that end an answer are forbidden."""
    config = json.loads((options.hf / "config.json").read_text())
    ends = config.get("eos_token_id", [])
    forbidden = {0, *(ends if isinstance(ends, list) else [ends])}  # 0: <|endoftext|>, which llama.cpp ends at too
    return {"logit_bias": {str(token): -100 for token in sorted(forbidden)}}


def llama_cpp_python(options: argparse.Namespace) -> Subject:
    command = local.llama_cpp_python(options.gguf, NAME, 0, threads(options), CONTEXT)
    server = Server(with_port(command))
    return Subject(
        "llama-cpp-python", "llama-cpp-python", options.gguf.name, (server,), "/openapi.json", no_end(options),
        direct=False,  # it answers 400 to a request ID that is no UUID, and the generator's is none
    )  # fmt: skip


def llama_server(options: argparse.Namespace) -> Subject:
    server = Server(with_port(local.llama_server(options.gguf, NAME, 0, threads(options), CONTEXT)))
    no_cache = {"cache_prompt": False}  # direct and proxied runs have the same prompts
    return Subject("llama-server", "llama-server", options.gguf.name, (server,), extra=no_cache, gauges="llamacpp")


def with_port(command: list[str]) -> tuple[str, ...]:
    place = command.index("--port") + 1
    return (*command[:place], "{port}", *command[place + 1 :])


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "transformers": one_at_a_time,
    "transformers-continuous": continuous,
    "vllm": vllm,
    "llama-cpp-python": llama_cpp_python,
    "llama-server": llama_server,
}


# -- one flag changed, and two GPUs ------------------------------------------------------------------------------------

KNOBS: dict[str, tuple[str, ...]] = {
    "base": (),
    "max-num-seqs-64": ("--max-num-seqs", "64"),
    "max-num-seqs-512": ("--max-num-seqs", "512"),
    "memory-0.5": ("--gpu-memory-utilization", "0.5"),
    "batched-tokens-2048": ("--max-num-batched-tokens", "2048"),
    "batched-tokens-8192": ("--max-num-batched-tokens", "8192"),
    "no-chunked-prefill": ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
    "prefix-caching": ("--enable-prefix-caching",),
    "eager": ("--enforce-eager",),
    "kv-fp8": ("--kv-cache-dtype", "fp8"),
    "stream-interval-8": ("--stream-interval", "8"),
    "block-size-32": ("--block-size", "32"),
}


def knob(name: str, options: argparse.Namespace) -> Subject:
    flags = KNOBS[name]
    weights = f"{options.hf.name}, bf16"
    return Subject(name, "vllm", weights, (vllm_server(options, *flags),), gauges="vllm", knob=shlex.join(flags))


def two_gpus(options: argparse.Namespace) -> list[Subject]:
    """One GPU, one server on two GPUs, and two servers on one GPU each behind the proxy."""
    weights = f"{options.hf.name}, bf16"
    both = [vllm_server(options, CUDA_VISIBLE_DEVICES=str(gpu)) for gpu in (0, 1)]
    split = vllm_server(options, "--tensor-parallel-size", "2")
    return [
        Subject("one-gpu", "vllm", weights, (both[0],), gauges="vllm"),
        Subject("tensor-parallel-2", "vllm", weights, (split,), gauges="vllm", knob="--tensor-parallel-size 2"),
        Subject("data-parallel-2", "vllm", weights, tuple(both), gauges="vllm", knob="two servers behind the proxy"),
    ]
