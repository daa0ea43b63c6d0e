"""What a request costs the proxy apart from the sockets: reading it, deciding, accounting, passing on a chunk of a
stream; and how decide() grows.

    python -m bench.parts

Each part is called in a loop, in this process, on a fleet that is up; shown are the median, minimum and maximum of
the repeats, in microseconds. With the sockets, client to upstream and back: python -m bench.overhead.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import orjson
import uvloop
from starlette.types import Message

from xgen_proxy import sse
from xgen_proxy.api.inference import InferenceEndpoint
from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.downstream.direct_writer import DirectWriter
from xgen_proxy.downstream.disconnect import DisconnectMonitor
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.fleet.memory.pressure import LEVELS, Pressure
from xgen_proxy.forwarding.progress import Progress
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer
from xgen_proxy.gateway import Gateway
from xgen_proxy.observability import logging_setup
from xgen_proxy.request.call import Origin
from xgen_proxy.request.json_body import read_json
from xgen_proxy.routing.policy import decide
from xgen_proxy.upstream.connection import Connection
from xgen_proxy.upstream.pool import Pool

RAW = b'{"model":"m","messages":[{"role":"user","content":"Hello, how are you today?"}],"max_tokens":64}'
HEADERS = {b"host": b"x", b"content-type": b"application/json", b"content-length": b"96"}
EVENT = (
    b'data: {"id":"chatcmpl-8f3a2b5c9d1e4f60","object":"chat.completion.chunk","created":1764000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" hello"},"logprobs":null,"finish_reason":null}]}\n\n'
)
ORIGIN = Origin("id", HEADERS)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CALLS = 2000
SIZES = (1, 10, 100, 1000, 10_000)
NAME = "m"


def gateway(replicas: int) -> Gateway:
    """A GPU and a CPU backend with this many replicas each, all of them up."""
    urls = [[f"http://127.0.0.{path}:{port + 1}" for port in range(replicas)] for path in (1, 2)]
    backends = {"vllm": {"urls": urls[0]}, "llama_cpp": {"urls": urls[1]}}
    made = Gateway(Settings(backends=backends))
    for backend in made.fleet.backends:
        for replica in backend.replicas:
            replica.record_info(ReplicaInfo((NAME,), 8192))
            replica.set_state("up", "")
        backend.record_info(backend.replicas[0], ReplicaInfo((NAME,), 8192))
    return made


def measure(call: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds a call, of each repeat."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - began) / CALLS * 1e6)
    return found


class Quiet(logging_setup.BatchingHandler):
    def add_line(self, line: bytes, level: int) -> None:
        """Discards the finished line."""


async def parts(repeats: int) -> list[tuple[str, list[float]]]:
    made = gateway(1)
    body = orjson.loads(RAW)
    endpoint = InferenceEndpoint(made, "chat")
    call = endpoint.parse(ORIGIN, RAW, body)
    progress = Progress(call)
    progress.first_choice = progress.target = made.router.targets(made.router.plan(call.features))[0]
    progress.attempts = 1
    writer = ResponseWriter(send, None)
    writer.first_output = time.perf_counter()

    def read() -> object:
        return endpoint.parse(ORIGIN, RAW, read_json(RAW, HEADERS, endpoint.gateway.settings.limits))

    def account() -> None:
        made.observer.request_finished(call, progress.outcome(200, writer))

    disconnects = DisconnectMonitor()

    def watch() -> None:
        with disconnects.watch(receive):
            pass

    targets = made.router.targets(made.router.plan(call.features))

    def acquire_and_release() -> None:
        target = made.admission.try_acquire(targets)
        assert target is not None
        made.admission.release(target.replica)

    return [
        ("read: JSON, features, limits", measure(read, repeats)),
        ("request id", measure(lambda: request_id(HEADERS), repeats)),
        ("decide", measure(lambda: made.router.targets(made.router.plan(call.features)), repeats)),
        ("acquire and release a slot", measure(acquire_and_release, repeats)),
        ("watch for the client", measure(watch, repeats)),
        ("answer's headers", measure(progress.response_headers, repeats)),
        ("metrics and log line", measure(account, repeats)),
    ]  # fmt: skip


class Nowhere(asyncio.Transport):
    def write(self, data: object) -> None:
        """Discards the data."""


async def chunk(repeats: int) -> list[float]:
    """From the bytes of an upstream to those for a client, kept in case the stream breaks."""
    connection = Connection(Pool("", 0), asyncio.get_running_loop())
    connection.connection_made(Nowhere())
    connection.begin(b"", 60)
    connection.data_received(STREAM)
    flow = SimpleNamespace(write_paused=False)
    state = {"disconnected": False, "response_complete": False, "chunked_encoding": True}
    cycle = SimpleNamespace(transport=Nowhere(), flow=flow, **state)
    reply = ResponseWriter(send, DirectWriter(cycle))  # type: ignore[arg-type]  # all of uvicorn's cycle that is looked at
    reply.sent_log = ReplayBuffer()
    on_data = reply.pass_through(sse.EventSplitter())
    reading = asyncio.create_task(connection.read(60, on_data=on_data))
    await asyncio.sleep(0)
    times = measure(lambda: connection.data_received(CHUNK), repeats)
    reading.cancel()
    assert reply.chunks == repeats * CALLS, "not all were handed on"
    return times


async def receive() -> Message:
    raise AssertionError("nothing waits")


async def send(message: Message) -> None:
    raise AssertionError("nothing is sent")


def growth(repeats: int) -> list[tuple[str, list[float]]]:
    found = []
    for size in SIZES:
        made = gateway(size)
        call = InferenceEndpoint(made, "chat").parse(ORIGIN, RAW, orjson.loads(RAW))
        fleet, routing, rng, now = made.fleet, made.settings.routing, random.Random(1), time.monotonic()
        changing = fleet.backends[0].replicas[size // 2]

        def after_a_change() -> None:
            changing.record_scrape(None)  # noqa: B023
            decide(call.features, fleet.snapshot(), routing, rng, now)  # noqa: B023

        times = measure(after_a_change, repeats)
        found.append((f"snapshot() and decide() with 2 x {size:,} replicas, one just changed", times))
    return found


def under_pressure(repeats: int) -> list[tuple[str, list[float]]]:
    """With 2 x 1,000 replicas, all of them in the same state, for a request with a session and for one without."""
    found = []
    for level in (None, *LEVELS[1:]):
        made = gateway(1000)
        for replica in made.fleet.replicas:
            replica.memory.pressure = None if level is None else Pressure(level, 3, "memory: KV cache 98% used")
            replica.record_pressure()
        fleet, routing, rng, now = made.fleet, made.settings.routing, random.Random(1), time.monotonic()
        for session in (None, "s"):
            body = {**orjson.loads(RAW), **({"session_id": session} if session else {})}
            features = InferenceEndpoint(made, "chat").parse(ORIGIN, RAW, body).features

            def decided() -> None:
                fleet.backends[0].replicas[500].record_scrape(None)  # noqa: B023
                decide(features, fleet.snapshot(), routing, rng, now)  # noqa: B023

            name = f"the same with 2 x 1,000, all {level or 'normal'}{', and a session' if session else ''}"
            found.append((name, measure(decided, repeats)))
    return found


def shown(rows: list[tuple[str, list[float]]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name.ljust(width)}  {statistics.median(times):6.1f} ({min(times):.1f} to {max(times):.1f}) us"
        for name, times in rows
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    logging.basicConfig(level=logging.INFO)
    logging_setup.json_handler = Quiet(sys.stderr.fileno())
    gc.collect()
    gc.freeze()  # as the server does
    rows = await parts(repeats)
    rows.append(("all of these", [sum(times) for times in zip(*(times for _, times in rows), strict=True)]))
    grown = growth(repeats) + under_pressure(repeats)
    print(shown(rows), shown([("a chunk", await chunk(repeats))]), shown(grown), sep="\n\n")


if __name__ == "__main__":
    uvloop.run(main())
