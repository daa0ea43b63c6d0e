"""Real streams that are cut in the middle and resumed on real servers."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.proxied_backend import GREEDY, NEVER_ENDING, Json, chat
from tests.support.real_servers import MODEL, Proxy, Server
from tests.support.stream_cutter import StreamCutter
from tests.support.waiting import wait_until

LENGTH = 16
CUTS = [1, 5, LENGTH - 2]
CHAT = chat("Tell me a story about a red fox.", max_tokens=LENGTH, **NEVER_ENDING)
TEXT = {"model": MODEL, "prompt": "Once upon a time, a red fox", "max_tokens": LENGTH, **GREEDY, **NEVER_ENDING}
BEGUN = {"role": "assistant", "content": "Once upon a time, a red fox"}  # the answer goes on after these words
PREFILLED = {
    **CHAT, "messages": [*CHAT["messages"], BEGUN], "continue_final_message": True, "add_generation_prompt": False,
}  # fmt: skip
REQUESTS: dict[str, tuple[str, Json]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "prefilled chat": ("/v1/chat/completions", PREFILLED),
    "completion": ("/v1/completions", TEXT),
}
COMMENT = "\n: resumed on "  # the SSE comment of a resumed stream
ENGINES = ["llama_server", "llama_cpp_python", "vllm_server"]
CANNOT = ("llama_cpp_python", "prefilled chat")  # it would begin a new message


@dataclass
class Pair:
    """`first` is cut, `second` resumes; both may be the same server."""

    proxy: Proxy
    cutter: StreamCutter

    def ask(self, kind: str, cut_after: int | None, whole: str | None = None) -> tuple[str, Json, str]:
        """(text, usage, raw response). Repeated if nothing was cut, or if all of `whole` was sent before the cut: a
        slow vLLM puts several tokens into one event, maybe the last ones."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            cuts = self.cutter.cuts
            answer = self._ask(kind, cut_after)
            was_cut = self.cutter.cuts > cuts and COMMENT in answer
            if cut_after is None or (was_cut and text_before_cut(answer) != whole):
                return *read(answer), answer
        raise AssertionError(f"no answer had more than {cut_after} events:\n{answer}")

    def _ask(self, kind: str, cut_after: int | None) -> str:
        """A good answer between two cuts keeps the circuit breaker closed."""
        path, body = REQUESTS[kind]
        first = {**body, "backend": "first"}
        good = httpx.post(self.proxy.url + path, json={**first, "max_tokens": 1}, timeout=120)
        assert good.headers["x-backend"] == "first", good.text
        self.cutter.cut_after = cut_after
        body = {**first, "stream": True, "stream_options": {"include_usage": True}}
        answer = httpx.post(self.proxy.url + path, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.text


def read(answer: str) -> tuple[str, Json]:
    """The text and usage of a stream in which the break must not show."""
    events = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", answer
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1, answer
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"], answer
    if "delta" in choices[0]:
        assert sum("role" in choice["delta"] for choice in choices) == 1, answer
        return "".join(choice["delta"].get("content") or "" for choice in choices), chunks[-1]["usage"]
    return "".join(choice["text"] for choice in choices), chunks[-1]["usage"]


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest, start_proxy: Callable[..., Proxy], template: Path
) -> Iterator[Callable[[str, str], Pair]]:
    """pair(first, second) with the names of fixtures → a Pair."""
    made: dict[tuple[str, str], Pair] = {}

    def make(first: str, second: str) -> Pair:
        if (first, second) not in made:
            one: Server = request.getfixturevalue(first)
            other: Server = request.getfixturevalue(second)
            cutter = StreamCutter(one.url)
            env = settings("first", cutter.url, one, "gpu", template)
            env |= settings("second", other.url, other, "cpu", template)
            proxy = start_proxy(env=env)
            wait_until(lambda: all_up(proxy), 60, "both backends to be up")
            made[first, second] = Pair(proxy, cutter)
        return made[first, second]

    yield make
    for each in made.values():
        each.proxy.stop()
        each.cutter.close()


def all_up(proxy: Proxy) -> bool:
    backends = httpx.get(f"{proxy.url}/models/status", timeout=10).json()["backends"]
    return all(replica["up"] for backend in backends for replica in backend["replicas"])


def settings(name: str, url: str, server: Server, device_class: str, template: Path) -> dict[str, Any]:
    dialect = "vllm" if server.name == "vLLM" else server.name
    values = {"urls": url, "dialect": dialect, "device_class": device_class, "context": "2048"}
    if dialect == "llama-cpp-python":
        values["chat_template"] = str(template)
    return {f"XGEN_BACKENDS__{name.upper()}__{key.upper()}": value for key, value in values.items()}


@pytest.mark.parametrize(("engine", "kind"), [both for both in itertools.product(ENGINES, REQUESTS) if both != CANNOT])
def test_an_engine_resumes_its_own_stream(pair: Callable[[str, str], Pair], engine: str, kind: str) -> None:
    """Without sampling, the text equals that of an unbroken stream: nothing is lost or repeated, and the model
    continued its own text."""
    both = pair(engine, engine)
    text, usage, _ = both.ask(kind, None)
    for cut in CUTS:
        again, counted, answer = both.ask(kind, cut)
        assert again == text, f"cut after {cut} events"
        counts = [(each["prompt_tokens"], each["completion_tokens"], each["total_tokens"]) for each in (usage, counted)]
        assert counts[0] == counts[1], f"cut after {cut} events: {answer}"


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize(
    ("first", "second"),
    [("vllm_server", "llama_cpp_python"), ("vllm_server", "llama_server"), ("llama_server", "vllm_server")],
)
def test_another_engine_resumes(pair: Callable[[str, str], Pair], first: str, second: str, kind: str) -> None:
    """Its floats differ slightly, so it may choose other words; the text already sent stays."""
    both = pair(first, second)
    whole, usage, _ = both.ask(kind, None)
    for cut in CUTS[1:]:
        text, counted, answer = both.ask(kind, cut, whole)
        shown = text_before_cut(answer)
        assert shown
        assert whole.startswith(shown)
        assert text.startswith(shown)
        assert text != shown
        assert counted["prompt_tokens"] == usage["prompt_tokens"]
        assert abs(counted["completion_tokens"] - LENGTH) <= 1, "tokens around the cut may be split differently"


def text_before_cut(answer: str) -> str:
    """The text before the comment that names the resuming backend."""
    lines = answer.partition(COMMENT)[0].splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: ")]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
