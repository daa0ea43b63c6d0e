"""How far apart two running engines are: bf16 on vLLM, Q4_1 on llama.cpp, and a model that is deliberately another."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support import real_servers as servers
from tests.support.real_servers import Proxy, Server
from tests.support.waiting import wait_until
from xgen_proxy.models.served.commands import add_distance, run_served

TEXTS = Path(__file__).parents[2] / "bench" / "texts"
SIZES = ["--tokens", "100", "--window", "64"]


def distance(*words: str, texts: tuple[str, ...] = ("english", "korean")) -> int:
    parser = argparse.ArgumentParser()
    add_distance(parser.add_subparsers())
    files = [word for name in texts for word in ("--text", str(TEXTS / f"{name}.txt"))]
    arguments = parser.parse_args(["distance", *words, *files, *SIZES])
    return run_served(arguments)


def measured(file: Path) -> dict[str, Any]:
    [pair] = json.loads(file.read_text())["pairs"]
    found: dict[str, Any] = pair
    return found


def pair_of(proxy: Proxy) -> Any:
    return next(iter(httpx.get(f"{proxy.url}/models/status").json()["model_pairs"]), {})


@pytest.fixture(scope="module")
def alien(tmp_path_factory: pytest.TempPathFactory, gguf: str) -> Iterator[Server]:
    """The same weights with two words of the vocabulary exchanged: another tokenizer."""
    data = Path(gguf).read_bytes()
    one, other, nothing = (word.encode() for word in ("Ġthe", "Ġand", "\x00\x00\x00\x00\x00"))
    head = (5).to_bytes(8, "little")
    assert data.count(head + one) == data.count(head + other) == 1
    data = data.replace(head + one, head + nothing).replace(head + other, head + one)
    folder = tmp_path_factory.mktemp("alien")
    path = folder / "alien.gguf"
    path.write_bytes(data.replace(head + nothing, head + other))
    server = servers.llama_server(folder / "log", str(path))
    try:
        yield server.start().wait_ready()
    finally:
        server.stop()
        path.unlink()


def test_llama_server_is_close_to_vllm(vllm_server: Server, llama_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "distance.json"
    assert distance(vllm_server.url, llama_server.url, "--json", str(file)) == 0
    pair = measured(file)
    assert (pair["reference"]["backend"], pair["other"]["backend"], pair["model"]) == ("vllm", "llama_cpp", "smollm2")
    assert set(pair["texts"]) == {"english", "korean"}
    for figures in (*pair["texts"].values(), pair["all"]):
        assert 0.8 < figures["top1"] < 1
        assert 0 < figures["kld_at_least"] < 0.1
        assert figures["undecided"] == 0
        assert figures["named_mass"] > 0.5


def test_llama_cpp_python_is_close_to_vllm(vllm_server: Server, llama_cpp_python: Server, tmp_path: Path) -> None:
    """In English; it names tokens by their text only."""
    file = tmp_path / "distance.json"
    words = vllm_server.url, llama_cpp_python.url, "--json", str(file)
    assert distance(*words, texts=("english",)) == 0
    figures = measured(file)["all"]
    assert 0.8 < figures["top1"] < 1
    assert 0 < figures["kld_at_least"] < 0.1


def test_the_proxy_uses_what_was_measured_through_it(
    vllm_server: Server, llama_server: Server, start_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    flags = ["--vllm", vllm_server.url, "--llama-cpp", llama_server.url, "--engine", "llama-server"]
    file = tmp_path / "distance.json"
    first = start_proxy(*flags)
    first.wait_ready()
    wait_until(lambda: pair_of(first).get("same_tokenizer"), 30)
    assert distance("--url", first.url, "--json", str(file), texts=("english",)) == 0
    env = {"XGEN_FALLBACK__DISTANCES": str(file), "XGEN_FALLBACK__MIN_TOP1": "0.999"}
    second = start_proxy(*flags, env=env)
    second.wait_ready()
    chat = {"model": servers.MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    wait_until(lambda: pair_of(second).get("top1"), 30)
    plan = httpx.post(f"{second.url}/route", json=chat).json()
    assert [each["backend"] for each in plan["candidates"]] == ["vllm"]
    assert "too far from vllm's" in plan["rejections"][0]["reason"]


def test_a_different_model_is_refused_and_warned_about(
    llama_server: Server, alien: Server, start_proxy: Callable[..., Proxy], capsys: pytest.CaptureFixture[str]
) -> None:
    assert distance(llama_server.url, alien.url, "--backends", "one,two") == 1
    assert "into different tokens" in capsys.readouterr().err
    backends = {"ONE": llama_server, "TWO": alien}
    env = {f"XGEN_BACKENDS__{name}__URLS": server.url for name, server in backends.items()}
    env |= {f"XGEN_BACKENDS__{name}__DIALECT": "llama-server" for name in backends}
    proxy = start_proxy(env=env)
    proxy.wait_ready()
    wait_until(lambda: pair_of(proxy).get("same_tokenizer") is False, 30)
    assert "one and two both serve smollm2, but split a text into different tokens" in proxy.tail()


def test_two_engines_of_the_same_file_have_the_same_tokenizer(
    llama_server: Server, llama_cpp_python: Server, start_proxy: Callable[..., Proxy]
) -> None:
    urls = {"ONE": llama_server, "TWO": llama_cpp_python}
    env = {f"XGEN_BACKENDS__{name}__URLS": server.url for name, server in urls.items()}
    env |= {f"XGEN_BACKENDS__{name}__DIALECT": server.name for name, server in urls.items()}
    proxy = start_proxy(env=env)
    proxy.wait_ready()
    wait_until(lambda: pair_of(proxy).get("same_tokenizer") is True, 30)


def test_one_command_serves_one_model_on_both_paths(
    vllm_server: Server, vllm_model: str, converter: str, tmp_path: Path
) -> None:
    """`make both` with a vLLM that runs already: the GGUF is made, both serve one name, and the proxy knows how far
    apart they are. The process leaves nothing behind."""
    flags = ["--model", vllm_model, "--vllm", vllm_server.url, "--converter", converter]
    places = ["--out", str(tmp_path), "--run-dir", str(tmp_path / "run"), "--port", "0", "--ctx", "512"]
    words = tmp_path / "words"
    command = [sys.executable, "-m", "backends.both", *flags, *places, "--tokens", "32"]
    with words.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    try:
        wait_until(lambda: "The same by hand" in words.read_text() or process.poll() is not None, 180)
        said = words.read_text()
        listens = re.search(r"listens on (http://\S+)", said)
        assert listens, said
        assert "same top token" in said
        status = httpx.get(f"{listens[1]}/models/status").json()
        assert status["models"] == [servers.MODEL]
        assert [each["name"] for each in status["backends"]] == ["llama_cpp", "vllm"]
        wait_until(lambda: httpx.get(f"{listens[1]}/models/status").json()["model_pairs"][0]["top1"], 30)
        assert list(tmp_path.glob("*-Q8_0.gguf"))
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "backend": "llama_cpp"}
        assert httpx.post(f"{listens[1]}/v1/chat/completions", json=chat, timeout=60).status_code == 200
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        assert process.wait(60) == 0
        psutil.wait_procs(family, 10)
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
