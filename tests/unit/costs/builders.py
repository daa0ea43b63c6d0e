"""Machines, runs and subjects."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xgen_proxy.costs.costs import Subject, subjects
from xgen_proxy.costs.measurements import Repeat, Run
from xgen_proxy.costs.prices import Machine


def machine(name: str = "gpu", fixed: float = 3.6, extra: float = 0.0, replicas: int = 1) -> Machine:
    return Machine(name=name, what="a server", fixed=fixed, extra=extra, replicas=replicas, source="an offer", date="")


def repeat(
    goodput: float,
    throughput: float | None = None,
    tokens_in: float | None = 200.0,
    tokens_out: float | None = 100.0,
    failed: int = 0,
) -> Repeat:
    served = goodput if throughput is None else throughput
    return Repeat(goodput=goodput, throughput=served, tokens_in=tokens_in, tokens_out=tokens_out, failed=failed)


def run(
    *repeats: Repeat | float,
    machine: str = "gpu",
    subject: str = "vllm",
    rate: float = math.inf,
    concurrency: int | None = None,
    where: str | None = None,
) -> Run:
    made = tuple(repeat(each) if isinstance(each, int | float) else each for each in repeats)
    return Run(machine=machine, subject=subject, where=where, rate=rate, concurrency=concurrency, repeats=made)


def subject(*runs: Run, on: Machine | None = None) -> Subject:
    [only] = subjects(runs, lambda name: on or machine(name))
    return only


def two(gpu: Sequence[float] = (40.0,), cpu: Sequence[float] = (1.0,)) -> list[Subject]:
    """A rented GPU at 2.5 an hour, and CPUs at 0.2, with these repeats: break-even above 12 requests/s."""
    machines = {"gpu": machine("gpu", 2.5), "cpu": machine("cpu", 0.2)}
    runs = [run(*gpu, machine="gpu", subject="vllm"), run(*cpu, machine="cpu", subject="llama-server")]
    return subjects(runs, machines.__getitem__)
