"""The command: its flags, what it prints and writes, and its exit status."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.scripted_engines import client, engine, llama_server, vllm
from xgen_proxy.config.fallback import read_distances
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.served import commands, engines
from xgen_proxy.models.served.engines import VLLM, Engine, LlamaServer

TEXT = " ".join(str(n) for n in range(1000, 1100))
GPU, CPU = "http://gpu:8000", "http://cpu:8081"


@pytest.fixture(autouse=True)
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines' clients are scripted. Each lists its model m, and the CPU's a second one."""

    def engine_at(url: str) -> httpx.Client:
        if url not in (GPU, CPU):
            raise ModelError(f"{url} does not answer")
        return client(vllm if url == GPU else two_models)

    def connect(url: str, model: str | None, key: str | None, *, alias: bool = False) -> Engine:
        found = engine_at(url)
        with monkeypatch.context() as patched:
            patched.setattr(httpx, "Client", lambda **_: found)
            return engines.connect(url, model, key, alias=alias)

    monkeypatch.setattr(commands, "connect", connect)


def two_models(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path == "/v1/models":
        cards = llama_server(path, body)["data"]
        return {"data": [*cards, {**cards[0], "id": "public"}]}
    return llama_server(path, body)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_distance(parser.add_subparsers())
    return commands.run_served(parser.parse_args(["distance", *words]))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "numbers.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_table_and_a_file_that_the_proxy_reads(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "distance.json"
    assert run(GPU, CPU, "--text", text, "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert f"m: vllm (vllm, {GPU}) and llama_cpp (llama-server, {CPU})" in printed
    assert "100.0% ± 0.0%" in printed
    assert read_distances([file]) == {("vllm", "llama_cpp", "m"): 1.0, ("llama_cpp", "vllm", "m"): 1.0}
    content = json.loads(file.read_text())
    assert content["conditions"]["machine"]["cores"]
    assert "lower bound" in content["formula"]
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_no_key_and_no_password_gets_into_the_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(url: str, model: str | None, key: str | None, *, alias: bool) -> Engine:
        found = engine(VLLM if "gpu" in url else LlamaServer)
        found.url = url
        return found

    monkeypatch.setattr(commands, "connect", connect)
    file = tmp_path / "distance.json"
    words = ["http://me:hush@gpu:8000", CPU, "--text", text, "--json", str(file), "--engine-key", "hush"]
    monkeypatch.setattr("sys.argv", ["xgen-proxy", "models", "distance", *words])
    assert run(*words, "--api-key=hush") == 0
    assert "hush" not in file.read_text() + capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["conditions"]["command"].startswith(f"xgen-proxy models distance {GPU} {CPU} --text {text}")
    assert content["pairs"][0]["reference"]["url"] == GPU


def test_names_and_model_can_be_given(text: str, tmp_path: Path) -> None:
    file = tmp_path / "distance.json"
    assert run(GPU, CPU, "--text", text, "--json", str(file), "--backends", "big, small", "--model", "public") == 0
    assert ("big", "small", "public") in read_distances([file])
    [pair] = json.loads(file.read_text())["pairs"]
    assert (pair["reference"]["served_as"], pair["other"]["served_as"]) == ("m", "public"), "the GPU's has only one"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the addresses of two engine servers"),
        ([GPU], "give the addresses of two engine servers"),
        ([GPU, CPU, "--model", "none"], "http://cpu:8081 does not serve none; it serves m, public"),
        ([GPU, "http://gone"], "http://gone does not answer"),
        ([GPU, GPU], "--backends needs two names that differ"),
        ([GPU, CPU, "--url", "http://proxy"], "not both"),
        ([GPU, CPU, "--json", "/nowhere/file.json"], "/nowhere is not a folder"),
        ([GPU, CPU, "--text", "/nowhere.txt"], "a text cannot be read: .*nowhere.txt"),
    ],
)
def test_mistakes(text: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--text", text, *words) == 2
    assert re.search(message, capsys.readouterr().err)


def replica(url: str, *, up: bool = True) -> dict[str, Any]:
    return {"url": url, "up": up}


def backend(name: str, device: str, *replicas: dict[str, Any], model: str = "public") -> dict[str, Any]:
    return {"name": name, "device_class": device, "models": {model: "m"}, "replicas": list(replicas)}


def through_proxy(monkeypatch: pytest.MonkeyPatch, *backends: dict[str, Any]) -> None:
    status = {"default_model": "public", "backends": list(backends)}
    monkeypatch.setattr(commands, "ask", lambda client, url: status)


def test_a_proxy_tells_which_backends_serve_the_same_model(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is on the GPU, and a replica that is up is asked."""
    cpu = backend("small", "cpu", replica("http://gone", up=False), replica(CPU))
    through_proxy(monkeypatch, cpu, backend("big", "gpu", replica(GPU)), backend("x", "cpu", model="other"))
    file = tmp_path / "distance.json"
    assert run("--url", "http://proxy", "--text", text, "--json", str(file)) == 0
    assert ("big", "small", "public") in read_distances([file])


@pytest.mark.parametrize(
    ("backends", "problem"),
    [
        ([backend("big", "gpu", replica(GPU))], "one backend serves it, or none"),
        (
            [backend("big", "gpu", replica(GPU)), backend("small", "cpu", replica(CPU, up=False))],
            "small has no replica",
        ),
    ],
)
def test_nothing_to_compare(
    text: str,
    backends: list[dict[str, Any]],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    through_proxy(monkeypatch, *backends)
    assert run("--url", "http://proxy", "--text", text) == 2
    assert problem in capsys.readouterr().err
