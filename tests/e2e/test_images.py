"""Images on real engines: a vLLM and a llama-server that see, with random weights, and a llama-server that does not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from PIL import Image

from tests.support import real_servers as servers
from tests.support.documents import ROOT
from tests.support.images import BLUE, RED, about, data_url, image, png_bytes
from tests.support.proxied_backend import GREEDY, NEVER_ENDING, Json, assert_openai_error
from tests.support.real_servers import MODEL, Proxy, Server
from tests.support.stream_cutter import StreamCutter
from tests.support.tiny_vision import PATCHES, make_mmproj
from tests.support.waiting import wait_until

Start = Callable[..., Proxy]
LENGTH = 24
COMMENT = "\n: resumed on "
HERE = {"backend": "seeing"}


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmproj") / "mmproj.gguf"
    make_mmproj(path)
    return path


@pytest.fixture(scope="module")
def seeing_llama(logs: Path, gguf: str, mmproj: Path) -> Iterator[Server]:
    server = servers.llama_server(logs / "seeing_llama.log", gguf, "--mmproj", str(mmproj))
    with servers.running(server):
        yield server


@pytest.fixture(scope="module")
def seeing_vllm(
    logs: Path, vllm_program: str, vllm_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("idefics3")
    maker = [str(Path(vllm_program).with_name("python")), "tests/support/tiny_vision.py", vllm_model, str(model)]
    subprocess.run(maker, cwd=ROOT, check=True, capture_output=True)
    with servers.running(servers.vllm(logs / "seeing_vllm.log", vllm_program, str(model), tools=False)) as server:
        yield server


@pytest.fixture(scope="module", params=["seeing_llama", "seeing_vllm"])
def seeing(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


DIALECTS = {"vLLM": "vllm", "llama-server": "llama-server"}


def proxy_of(start_proxy: Start, **urls: tuple[str, str]) -> Proxy:
    """`urls`: backend → (URL, dialect). All have the same public model."""
    env = {}
    for name, (url, dialect) in urls.items():
        env[f"XGEN_BACKENDS__{name.upper()}__URLS"] = url
        env[f"XGEN_BACKENDS__{name.upper()}__DIALECT"] = dialect
    proxy = start_proxy(env=env)
    wait_until(lambda: capabilities(proxy).keys() == urls.keys(), 60, "all backends to be up")
    return proxy


def capabilities(proxy: Proxy) -> dict[str, set[str]]:
    """Of each backend that is up."""
    backends = httpx.get(proxy.url + "/models/status", timeout=10).json()["backends"]
    return {each["name"]: set(each["capabilities"]) for each in backends if each["replicas"][0]["up"]}


def ask(url: str, messages: Any, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, **GREEDY, **fields}
    return httpx.post(url + "/v1/chat/completions", json=body, timeout=120)


def usage(answer: httpx.Response) -> Json:
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()["usage"]
    return found


@pytest.fixture(scope="module")
def mixed(start_proxy: Start, seeing: Server, llama_server: Server) -> Proxy:
    """One engine that sees, and one that does not and would be the cheaper choice."""
    return proxy_of(
        start_proxy, seeing=(seeing.url, DIALECTS[seeing.name]), blind=(llama_server.url, DIALECTS["llama-server"])
    )


def test_engines_tell_what_they_read(mixed: Proxy) -> None:
    found = capabilities(mixed)
    assert "images" in found["seeing"]
    assert found["blind"].isdisjoint({"images", "audio", "video"})
    assert "audio" not in found["seeing"]


def test_an_image_is_seen(mixed: Proxy, seeing: Server) -> None:
    """Its patches count as tokens, as they do without the proxy, and it changes the answer."""
    answer = ask(mixed.url, about(image()))
    assert answer.headers["x-backend"] == "seeing"
    without = usage(ask(mixed.url, about(), backend="seeing"))
    assert usage(answer)["prompt_tokens"] >= without["prompt_tokens"] + PATCHES
    assert usage(answer)["prompt_tokens"] == usage(ask(seeing.url, about(image())))["prompt_tokens"]
    two = usage(ask(mixed.url, about(image(), image(BLUE))))
    assert two["prompt_tokens"] >= usage(answer)["prompt_tokens"] + PATCHES
    seen = [logprobs_of(ask(mixed.url, about(image(url)), logprobs=True, max_tokens=1)) for url in (RED, BLUE, RED)]
    assert seen[0] != seen[1]
    assert seen[0] == seen[2]


def logprobs_of(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return [(each["token"], round(each["logprob"], 3)) for each in answer.json()["choices"][0]["logprobs"]["content"]]


def test_a_stream_about_an_image(mixed: Proxy) -> None:
    answer = ask(mixed.url, about(image()), stream=True)
    assert answer.headers["x-backend"] == "seeing"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":' in answer.text


def test_an_image_in_a_message(mixed: Proxy) -> None:
    """Of Anthropic's API: in the user's turn, and in the result of a tool. The same tokens as in a chat."""
    source = {"type": "base64", "media_type": "image/png", "data": RED.partition(",")[2]}
    picture = {"type": "image", "source": source}
    question = {"type": "text", "text": about()[0]["content"][0]["text"]}
    with anthropic.Anthropic(base_url=mixed.url, api_key="none", max_retries=0) as client:

        def ask_about(*messages: Any, **fields: Any) -> tuple[str, int]:
            body = {"model": MODEL, "max_tokens": 8, "messages": [*messages], **fields}
            raw = client.messages.with_raw_response.create(**body)
            used = raw.parse().usage
            return raw.headers["x-backend"], used.input_tokens + (used.cache_read_input_tokens or 0)

        seen = ask_about({"role": "user", "content": [question, picture]})
        assert seen == ("seeing", usage(ask(mixed.url, about(image())))["prompt_tokens"])
        looked = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [picture]}
        turns = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": [looked]}]
        where, tokens = ask_about(*turns, {"role": "user", "content": [result]})
        without = {**result, "content": "[image]"}
        assert where == "seeing"
        assert tokens >= ask_about(*turns, {"role": "user", "content": [without]}, extra_body=HERE)[1] + PATCHES


def test_an_image_in_a_response(mixed: Proxy) -> None:
    """Of the Responses API: in the user's turn, and in the output of a function."""
    picture = {"type": "input_image", "image_url": RED, "detail": "auto"}
    question = {"type": "input_text", "text": about()[0]["content"][0]["text"]}
    with openai.OpenAI(base_url=f"{mixed.url}/v1", api_key="none", max_retries=0) as client:

        def ask_about(*items: Any, **fields: Any) -> tuple[str, int]:
            body: Json = {"model": MODEL, "max_output_tokens": 8, "input": [*items], **fields}
            raw = client.responses.with_raw_response.create(**body)
            answer = raw.parse()
            assert answer.usage is not None
            return raw.headers["x-backend"], answer.usage.input_tokens

        seen = ask_about({"role": "user", "content": [question, picture]})
        assert seen == ("seeing", usage(ask(mixed.url, about(image())))["prompt_tokens"])
        called = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "call_1", "output": [picture]}
        turns = [{"role": "user", "content": "Look."}, called]
        where, tokens = ask_about(*turns, output)
        without = {**output, "output": "The result follows."}
        assert where == "seeing"
        assert tokens >= ask_about(*turns, without, extra_body=HERE)[1] + PATCHES


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_formats(mixed: Proxy, form: str) -> None:
    """WebP needs ffmpeg beside llama-server, which then says so."""
    file = BytesIO()
    Image.new("RGB", (40, 30), (0, 128, 0)).save(file, form)
    answer = ask(mixed.url, about(image(data_url(file.getvalue(), f"image/{form.lower()}"))))
    if form == "WEBP" and answer.status_code != 200:
        assert_openai_error(answer, 400)
    else:
        assert answer.status_code == 200, answer.text


def test_an_image_that_cannot_be_decoded_is_the_clients_mistake(mixed: Proxy) -> None:
    # Its size can be read, and nothing after it. vLLM shows the model what it can read of a file that is cut short.
    broken = data_url(png_bytes(64, 64)[:29] + bytes(100))
    for stream in (False, True):
        assert_openai_error(ask(mixed.url, about(image(broken)), stream=stream), 400)
    assert usage(ask(mixed.url, about(image())))


def test_the_engine_that_does_not_see_is_never_asked(start_proxy: Start, llama_server: Server) -> None:
    proxy = proxy_of(start_proxy, blind=(llama_server.url, "llama-server"))
    error = assert_openai_error(ask(proxy.url, about(image())), 400)
    assert error["message"].endswith(": blind cannot do images")


@pytest.fixture
def cutter(seeing: Server) -> Iterator[StreamCutter]:
    made = StreamCutter(seeing.url)
    yield made
    made.close()


def test_a_broken_stream_about_an_image_is_resumed(
    start_proxy: Start, seeing: Server, cutter: StreamCutter, llama_server: Server, seeing_llama: Server
) -> None:
    proxy = proxy_of(
        start_proxy,
        first=(cutter.url, DIALECTS[seeing.name]),
        second=(seeing_llama.url, "llama-server"),
        blind=(llama_server.url, "llama-server"),
    )
    cutter.cut_after = 6
    fields: Json = {"max_tokens": LENGTH, "backend": "first", "stream_options": {"include_usage": True}}
    answer = ask(proxy.url, about(image()), stream=True, **fields, **NEVER_ENDING)
    assert cutter.cuts == 1
    assert f"{COMMENT}second@" in answer.text, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == LENGTH
    assert [each["choices"][0]["finish_reason"] for each in events if each["choices"]][-1] == "length"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_killed_engine_that_saw(
    start_proxy: Start, logs: Path, gguf: str, mmproj: Path, seeing: Server, llama_server: Server
) -> None:
    """In mid-stream another one that sees continues; then requests go there; and when it is alone, a 503 says so."""
    victim = servers.llama_server(logs / "victim.log", gguf, "--mmproj", str(mmproj)).start().wait_ready()
    try:
        proxy = proxy_of(
            start_proxy,
            victim=(victim.url, "llama-server"),
            other=(seeing.url, DIALECTS[seeing.name]),
            blind=(llama_server.url, "llama-server"),
        )
        body = {"model": MODEL, "messages": about(image()), "max_tokens": 200, "stream": True, "backend": "victim"}
        text = ""
        url = proxy.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json={**body, **GREEDY, **NEVER_ENDING}, timeout=120) as answer:
            for piece in answer.iter_text():
                text += piece
                if victim.process is not None and text.count("data: ") > 3 and COMMENT not in text:
                    victim.kill9()
        assert f"{COMMENT}other@" in text, text
        assert text.endswith("data: [DONE]\n\n")
        assert ask(proxy.url, about(image())).headers["x-backend"] == "other"
        chosen = ask(proxy.url, about(image()), backend="victim", fallback="none")
        assert "no backend that can do this request is up" in assert_openai_error(chosen, 503)["message"]
    finally:
        victim.stop()
