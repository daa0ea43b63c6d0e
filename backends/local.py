"""`make run`: CPU backends on this machine, and the proxy in front of them, until Ctrl-C.

Start: check the port → fetch the model → start the backends → wait until they generate → start the proxy → print how
to use it. Ctrl-C: the proxy drains → the backends end → nothing is left running.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_fixed

from backends.environment import ROOT, free_port, port_taken, usable_cores
from backends.models import DEFAULT, default_model, given_model
from backends.process import Child
from xgen_proxy.models.errors import ModelError

RUN = ROOT / "run"
ALIAS = "smollm2"
SLOTS = 4  # per llama-server
LOOPBACK = "127.0.0.1"
START_S = 300.0  # a large model on a slow disk
POLL_S = 0.1
LOG_EVERY = 100  # polls: 10 s or more
STOP_S = 5.0
DRAIN_S = float(os.environ.get("XGEN_DRAIN_S", "30")) + 5  # the proxy's own drain time and a margin
RESTART_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # pauses before a dead backend is restarted
SETTLED_S = 60.0  # a backend that ran this long starts over with the shortest pause
HI = '[{"role": "user", "content": "Hi"}]'
QUESTION = "What is the capital of France? Answer in one word."  # the default model answers it at temperature 0

ENGINES = ("llama-cpp-python", "llama-server")

T = TypeVar("T")


class LocalError(Exception):
    """Says what is wrong and what to do."""


@dataclass
class Backend:
    """A CPU backend process, its URL and its recent deaths."""

    child: Child
    url: str
    deaths: int = 0
    restart_at: float = 0.0
    started: float = field(default_factory=time.monotonic)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="backends.local", description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    parser.add_argument("--vllm", metavar="URL", default="", help="a vLLM server, the GPU backend")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=a_port, default=8080, help="0: any free port")
    parser.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--replicas", type=at_least_one, default=1, help="CPU backend processes")
    parser.add_argument("--ctx", type=at_least_one, default=4096, help="context length per request, in tokens")
    parser.add_argument("--run-dir", type=Path, default=RUN, help="folder of the logs and the lock")
    return parser.parse_args(argv)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def a_port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; ports are 0 to 65535")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    return supervised(run, parse(argv))


def supervised(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """The exit status of a command that starts servers and stays until it is interrupted."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background jobs inherit an ignored SIGINT
        signal.signal(number, interrupt)
    try:
        with only_one(options.run_dir, options.port):
            run(options)
    except (LocalError, ModelError, OSError) as error:  # OSError: a full disk, a folder without write permission
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        pass
    say("stopped; nothing is left running")
    return 0


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> None:
    if options.port and (taken := port_taken(options.host, options.port)):
        raise LocalError(taken)
    model = given_model(options.model) if options.model else default_model()
    name = name_on_gpu(options.vllm) or own_name(model)
    backends = [make_backend(options, model, name, number) for number in range(options.replicas)]
    os.environ.setdefault("XGEN_BACKENDS__LLAMA_CPP__CONTEXT", str(options.ctx))  # llama-cpp-python does not report it
    proxy = Child("proxy", proxy_command(options, backends), fresh(options.run_dir / "proxy.log"))
    try:
        for backend in backends:
            backend.child.start()
        set_template(options, model)
        for backend in backends:
            wait_for(backend.child, partial(generates, backend.url), f"{options.engine} to load {model.name}")
        proxy.start()
        url = wait_for(proxy, lambda: ready_url(proxy), "the proxy to be ready")
        welcome(url, name, options.run_dir)
        watch(backends, proxy)
    finally:
        shut_down(backends, proxy)


# starting


def make_backend(options: argparse.Namespace, model: Path, name: str, number: int) -> Backend:
    port = free_port()
    threads = max(1, (usable_cores() - 1) // options.replicas)  # more threads than free cores would be ten times slower
    command = COMMANDS[options.engine](model, name, port, threads, options.ctx)
    log = fresh(options.run_dir / f"llama_cpp-{number}.log")
    return Backend(Child(f"llama_cpp-{number}", command, log), f"http://127.0.0.1:{port}")


def set_template(options: argparse.Namespace, model: Path) -> None:
    """Give the proxy the model's chat template: llama-cpp-python does not serve it, and the proxy needs it to resume a
    chat that broke off on the GPU."""
    setting = "XGEN_BACKENDS__LLAMA_CPP__CHAT_TEMPLATE"
    if options.engine != "llama-cpp-python" or setting in os.environ:
        return
    path = fresh(options.run_dir / "tokenizer_config.json")
    command = [sys.executable, "-m", "backends.llama_cpp.template", str(model), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        os.environ[setting] = str(path)
    else:
        say(f"chats that break off on the GPU cannot be resumed here: {done.stderr.strip().rpartition(chr(10))[2]}")


def own_name(model: Path) -> str:
    return ALIAS if model.name == DEFAULT.name else model.stem


def name_on_gpu(vllm: str) -> str | None:
    """The name of vLLM's model. The CPU's model is served under the same name, so that it can replace a busy or lost
    GPU. None if settings map the names, or vLLM does not answer."""
    if not vllm or "XGEN_BACKENDS__LLAMA_CPP__MODELS" in os.environ:
        return None
    url = vllm.partition(",")[0].rstrip("/")
    try:
        name = str(httpx.get(f"{url}/v1/models", timeout=5, headers=vllm_key()).json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
        say(f"{url} does not report its model: the CPU can take over its requests only if the model has the same name")
        return None
    say(f"the CPU's model is served under the GPU's name, {name}, to take over its requests")
    return name


def vllm_key() -> dict[str, str]:
    key = os.environ.get("XGEN_BACKENDS__VLLM__API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def llama_cpp_python(model: Path, name: str, port: int, threads: int, ctx: int, host: str = LOOPBACK) -> list[str]:
    """Without interrupt_requests: it would let any newer request end the running stream."""
    return [
        sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", name,
        "--host", host, "--port", str(port), "--n_ctx", str(ctx), "--interrupt_requests", "false",
        "--n_threads", str(threads), "--n_threads_batch", str(threads),
    ]  # fmt: skip


def llama_server(model: Path, name: str, port: int, threads: int, ctx: int, host: str = LOOPBACK) -> list[str]:
    """With small batches: a request cancelled during its prompt frees its slot after the current batch."""
    return [
        sys.executable, "-m", "backends.llama_cpp.llama_server", "-m", str(model), "-a", name,
        "--host", host, "--port", str(port), "-c", str(SLOTS * ctx), "-np", str(SLOTS), "-t", str(threads),
        "-tb", str(threads), "-b", "64", "-ub", "64", "--metrics", "--slots", "--no-webui", "--offline",
    ]  # fmt: skip


COMMANDS: dict[str, Callable[..., list[str]]] = {
    "llama-cpp-python": llama_cpp_python,
    "llama-server": llama_server,
}


def proxy_command(options: argparse.Namespace, backends: list[Backend]) -> list[str]:
    command = [sys.executable, "-m", "xgen_proxy.cli", "serve", "--host", options.host, "--port", str(options.port)]
    command += ["--llama-cpp", ",".join(backend.url for backend in backends), "--engine", options.engine]
    return [*command, *(["--vllm", options.vllm] if options.vllm else [])]


def fresh(log: Path) -> Path:
    log.unlink(missing_ok=True)
    return log


def wait_for(child: Child, condition: Callable[[], T | None], what: str) -> T:
    """The first true result of `condition`. Raises LocalError when the child dies or time is up."""
    began = time.monotonic()
    poll = Retrying(
        retry=retry_if_result(lambda found: not found and child.alive),
        wait=wait_fixed(POLL_S),
        stop=stop_after_delay(START_S),
        before_sleep=partial(show_progress, what),
        retry_error_callback=lambda _: None,
    )
    if found := poll(condition):
        say(f"{time.monotonic() - began:4.1f} s  waited for {what}")
        return found
    if child.alive:
        raise LocalError(f"waited {START_S:g} s in vain for {what}; its last words:\n{child.last_lines()}")
    raise LocalError(f"{child.name} died while starting; its last words ({child.log}):\n{child.last_lines()}")


def show_progress(what: str, state: RetryCallState) -> None:
    """Count the seconds on a terminal; elsewhere print a line now and then."""
    if sys.stderr.isatty():
        waited = state.seconds_since_start or 0
        print(f"\r\033[K{waited:4.0f} s  waiting for {what} ", end="", file=sys.stderr, flush=True)
    elif state.attempt_number % LOG_EVERY == 1:
        say(f"waiting for {what}")


def answers(url: str, body: dict[str, object] | None = None) -> bool:
    """True if it answers 200. Ignores HTTP proxies in the environment, since the server is on this machine."""
    try:
        if body is None:
            return httpx.get(url, timeout=5, trust_env=False).status_code == 200
        return httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def generates(url: str) -> bool:
    return answers(f"{url}/v1/completions", {"prompt": "Hi", "max_tokens": 1})


def ready_url(proxy: Child) -> str | None:
    """The proxy's URL, once a model can answer through it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^listening on (\S+)", proxy.log.read_text(), re.MULTILINE)
        if found and answers(f"{found[1]}/ready"):
            return found[1]
    return None


def welcome(url: str, name: str, logs: Path) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if os.environ.get("XGEN_API_KEYS") not in (None, "none") else ""
    say(f"""
xgen-proxy listens on {url}   (Ctrl-C ends it; logs: {logs})

  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "{QUESTION}"}}], "temperature": 0}}'

  from openai import OpenAI
  chat = OpenAI(base_url="{url}/v1", api_key="none").chat.completions
  print(chat.create(model="{name}", messages={HI}, max_tokens=50).choices[0].message.content)
""")


# running


def watch(backends: list[Backend], proxy: Child) -> None:
    """Until Ctrl-C, restart backends that die. Meanwhile the proxy sends their requests elsewhere."""
    while True:
        time.sleep(0.2)
        if not proxy.alive:
            raise LocalError(f"the proxy died; its last words ({proxy.log}):\n{proxy.last_lines()}")
        for backend in backends:
            if not backend.child.alive:
                revive(backend)


def revive(backend: Backend) -> None:
    now = time.monotonic()
    if not backend.restart_at:
        backend.deaths = 1 if now - backend.started > SETTLED_S else backend.deaths + 1
        pause = RESTART_S[min(backend.deaths, len(RESTART_S)) - 1]
        backend.restart_at = now + pause
        say(f"{backend.child.name} died; starting it again in {pause:g} s. Its last words ({backend.child.log}):")
        say(backend.child.last_lines())
    elif now >= backend.restart_at:
        backend.restart_at = 0.0
        backend.started = now
        backend.child.start()


def shut_down(backends: list[Backend], proxy: Child) -> None:
    """Stop the proxy first, so that its requests can finish. A second Ctrl-C ends them at once."""
    try:
        if proxy.alive:
            say("stopping; running requests may finish first (Ctrl-C again: at once)")
        proxy.stop(DRAIN_S)
    except KeyboardInterrupt:
        proxy.stop(0)
    for backend in backends:
        backend.child.stop(STOP_S)


@contextlib.contextmanager
def only_one(folder: Path, port: int) -> Iterator[IO[str]]:
    """Allow one `make run` per checkout. The kernel releases the lock however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "local.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise LocalError(f"`make run` is already running here ({lock.read().strip()}); end that first") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, port {port}")
        lock.flush()
        yield lock


def say(line: str) -> None:
    """Print a line. On a terminal it replaces the line that counts seconds, or a ^C."""
    print(f"\r\033[K{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
