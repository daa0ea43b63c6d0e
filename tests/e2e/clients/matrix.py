"""The matrix: each client does three tasks against a proxy, and each column is one thing that must then be true.

1. A question: text, streamed, with usage.
2. A task of two turns: the model calls the client's tool, which writes a file, and then says so.
3. The same task, while the GPU's engine dies in the middle of the call. Another backend has to finish it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.clients.agents.claude_code import CLAUDE_CODE
from tests.e2e.clients.agents.codex import CODEX
from tests.e2e.clients.agents.opencode import OPENCODE
from tests.e2e.clients.agents.qwen_code import QWEN_CODE
from tests.e2e.clients.client import Client, Place, Seen, node, python
from tests.e2e.clients.installed import PYTHON
from tests.e2e.clients.scripted_model import AFTER, QUESTION, TASK, ScriptedModel, scripted_backend
from tests.support.running_proxy import RunningProxy, backend, running_proxy

RESULTS = Path(__file__).parent / "results.json"
COLUMNS = ("chat", "stream", "tools", "usage", "engine killed")
YES = "yes"
CONTEXT = 200_000  # tokens; agents send up to 20,000 of instructions and tools

CLIENTS = (
    python("openai (Python)", "chat completions", "with_openai.py"),
    python("openai (Python, asyncio)", "chat completions", "with_openai_async.py"),
    python("openai (Python), Responses", "responses", "with_openai_responses.py"),
    node("openai (Node)", "chat completions", "with_openai.mjs"),
    node("openai (Node), Responses", "responses", "with_openai_responses.mjs"),
    python("anthropic (Python)", "messages", "with_anthropic.py", PYTHON),
    node("anthropic (Node)", "messages", "with_anthropic.mjs"),
    python("LangChain", "chat completions", "with_langchain.py"),
    python("LlamaIndex", "chat completions", "with_llama_index.py", PYTHON),
    python("pydantic-ai", "chat completions", "with_pydantic_ai.py", PYTHON),
    python("instructor", "chat completions", "with_instructor.py", PYTHON),
    node("Vercel AI SDK, compatible", "chat completions", "with_ai_sdk.mjs"),
    node("Vercel AI SDK, OpenAI", "responses", "with_ai_sdk_openai.mjs"),
    node("Vercel AI SDK, Anthropic", "messages", "with_ai_sdk_anthropic.mjs"),
    *(agent.client for agent in (CLAUDE_CODE, CODEX, OPENCODE, QWEN_CODE)),
)

Row = dict[str, str]


@dataclass(frozen=True)
class Observed:
    """What is known after the three tasks: from the client, from the engines, and from the disk."""

    question: Seen
    task: Seen
    killed: Seen
    gpu: ScriptedModel
    cpu: ScriptedModel
    written: dict[str, str]


def row(client: Client, folder: Path) -> Row:
    """Runs one client. Its cells are `yes`, or `no: ` and the reason."""
    with backends() as (proxy, gpu, cpu):
        place = Place(proxy.url, folder / "work", folder / "home")
        place.work.mkdir()
        place.home.mkdir()
        files = {line: place.work / f"{line}.txt" for line in ("first", "second")}
        prompts = [QUESTION, *(TASK.format(line=line, path=path) for line, path in files.items())]
        version, seen = client.run(place, prompts)
        written = {line: path.read_text() if path.exists() else "" for line, path in files.items()}
        question, task, killed = seen
        observed = Observed(question, task, killed, gpu, cpu, written)
    cells = {column: cell(CHECKS[column], observed) for column in COLUMNS}
    if cells["chat"] != YES:  # the others fail for the same reason
        cells = {column: cells["chat"] if column == "chat" else "no" for column in COLUMNS}
    return {"client": client.name, "version": version, "api": client.api, **cells}


@contextmanager
def backends() -> Iterator[tuple[RunningProxy, ScriptedModel, ScriptedModel]]:
    """A proxy in front of a vLLM that dies writing `second`, and a llama-server."""
    (gpu, on_gpu), (cpu, on_cpu) = scripted_backend(dies_writing="second"), scripted_backend()
    vllm = backend(gpu, context=CONTEXT)
    llama_server = backend(cpu, context=CONTEXT, dialect="llama-server", device_class="cpu", tools=True)
    try:
        with running_proxy(backends={"vllm": vllm, "llama_cpp": llama_server}) as proxy:
            yield proxy, on_gpu, on_cpu
    finally:
        gpu.close()
        cpu.close()


def cell(check: Callable[[Observed], None], observed: Observed) -> str:
    try:
        check(observed)
    except AssertionError as failed:
        return f"no: {shortened(str(failed).partition('assert ')[0])}"
    return YES


def shortened(reason: str) -> str:
    """On one line, without what differs from run to run."""
    reason = re.sub(r"(127\.0\.0\.1|localhost):\d+|/tmp/\S+|req[-_][\w-]+", "…", " ".join(reason.split()))
    return reason if len(reason) < 200 else reason[:199] + "…"


def check_chat(observed: Observed) -> None:
    assert not observed.question.error, observed.question.error
    assert "Paris" in observed.question.text, f"it said {observed.question.text!r}"


def check_stream(observed: Observed) -> None:
    check_chat(observed)
    asked = [each for each in observed.gpu.asked if QUESTION in json.dumps(each)]
    assert any(each.get("stream") for each in asked), "it asks for whole answers"
    assert observed.question.pieces != 1, "the answer came in one piece"


def check_tools(observed: Observed) -> None:
    check_task(observed.task, observed.written["first"], "first")


def check_task(seen: Seen, written: str, line: str) -> None:
    assert not seen.error, seen.error
    assert written.strip() == line, f"the file has {written!r}; it said {seen.text!r}"
    assert AFTER in seen.text, f"it said {seen.text!r}"


def check_usage(observed: Observed) -> None:
    check_chat(observed)
    told = [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in observed.gpu.counted]
    told += [
        (sum(a for a, _ in told[:n]), sum(b for _, b in told[:n])) for n in range(2, len(told))
    ]  # several requests
    assert observed.question.usage, "it does not tell"
    assert observed.question.usage in told, f"it tells {observed.question.usage}, the engine {told}"


def check_killed(observed: Observed) -> None:
    check_task(observed.killed, observed.written["second"], "second")
    assert observed.gpu.died, "the engine was not killed"
    assert observed.cpu.asked, "no other backend was asked"


CHECKS: dict[str, Callable[[Observed], None]] = {
    "chat": check_chat,
    "stream": check_stream,
    "tools": check_tools,
    "usage": check_usage,
    "engine killed": check_killed,
}


def recorded() -> list[Row]:
    """The matrix as docs/clients.md shows it."""
    rows: list[Row] = json.loads(RESULTS.read_text())
    return rows
