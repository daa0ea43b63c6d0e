"""Asks a running engine how it splits a text into tokens and which next tokens it finds likely at each position.

vLLM answers for a whole prompt at once (`prompt_logprobs`), and so does llama-cpp-python (`echo` with `logprobs`), but
it names tokens by their text only. llama-server has no such field: it gets one request per position, of which its
cache knows all but the last token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import httpx

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.served.distance import Distribution, Likely

Tick = Callable[[], None]  # called once for each position

# Where the chosen token is part of a character, llama-server leaves its probabilities out, and with more tokens its
# first entry is another position's. So it has to choose a letter; the probabilities that it tells are those before.
A_LETTER = 'root ::= "a"'
TIMEOUT_S = 300.0  # a busy CPU reads a window of prompt in seconds


class Engine(ABC):
    """A running server. `model`: the name it serves the model under."""

    name: ClassVar[str]
    default_backend: ClassVar[str]  # what `xgen-proxy serve` calls it

    def __init__(self, client: httpx.Client, url: str, model: str) -> None:
        self.client = client
        self.url = url
        self.model = model

    @abstractmethod
    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, as the engine splits it."""

    @abstractmethod
    def distributions(self, text: str, tokens: Sequence[int], top: int, tick: Tick) -> list[Distribution | None]:
        """The `top` most likely tokens to follow tokens[: i + 1], for each i but the last; None if it cannot tell."""

    def details(self) -> dict[str, Any]:
        """What it says about itself, for the result file."""
        return {}

    def ask(self, path: str, body: Any = None) -> Any:
        """Raises ModelError."""
        return ask(self.client, self.url + path, body)


class VLLM(Engine):
    """Its `--max-logprobs`, 20 by default, limits what it names."""

    name = "vllm"
    default_backend = "vllm"

    def tokens(self, text: str) -> list[int]:
        return token_list(self.ask("/tokenize", {"model": self.model, "prompt": text}), self.url)

    def distributions(self, text: str, tokens: Sequence[int], top: int, tick: Tick) -> list[Distribution | None]:
        body = {"model": self.model, "prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": top}
        pages = self.ask("/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
        for _ in pages:
            tick()
        return [
            [Likely(int(id), each["decoded_token"] or "", each["logprob"]) for id, each in page.items()]
            for page in pages
        ]

    def details(self) -> dict[str, Any]:
        cards = self.ask("/v1/models")["data"]
        root = next((card.get("root") for card in cards if card["id"] == self.model), None)
        return {"version": self.ask("/version").get("version"), "root": root}


class LlamaServer(Engine):
    """The requests of a window go to the slot that has it in its cache."""

    name = "llama-server"
    default_backend = "llama_cpp"

    def tokens(self, text: str) -> list[int]:
        return token_list(self.ask("/tokenize", {"content": text, "add_special": True}), self.url)

    def distributions(self, text: str, tokens: Sequence[int], top: int, tick: Tick) -> list[Distribution | None]:
        found: list[Distribution | None] = []
        for end in range(1, len(tokens)):
            body = {"model": self.model, "prompt": list(tokens[:end]), "n_predict": 1, "n_probs": top}
            answer = self.ask("/completion", {**body, "temperature": 0, "cache_prompt": True, "grammar": A_LETTER})
            likely = answer["completion_probabilities"][0]["top_logprobs"]
            found.append([Likely(each["id"], text_of(each["bytes"]), each["logprob"]) for each in likely])
            tick()
        return found

    def details(self) -> dict[str, Any]:
        card = next(card for card in self.ask("/v1/models")["data"] if card["id"] == self.model)
        return {"version": self.ask("/props").get("build_info"), **(card.get("meta") or {})}


class LlamaCppPython(Engine):
    """With `--logits_all true`, the default of its server."""

    name = "llama-cpp-python"
    default_backend = "llama_cpp"

    def tokens(self, text: str) -> list[int]:
        return token_list(self.ask("/extras/tokenize", {"model": self.model, "input": text}), self.url)

    def distributions(self, text: str, tokens: Sequence[int], top: int, tick: Tick) -> list[Distribution | None]:
        """Its list has one entry for each token but a leading BOS, those of its answer last. In 0.3.36 an entry is what
        may follow its token if there is no BOS, and what may precede it if there is one. The first is always null."""
        body = {"model": self.model, "prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": top}
        answer = self.ask("/v1/completions", body)
        pages = answer["choices"][0]["logprobs"]["top_logprobs"]
        if len(pages) - answer["usage"]["completion_tokens"] not in (len(tokens), len(tokens) - 1):
            raise ModelError(
                f"{self.url} gave {len(pages)} positions for {len(tokens)} tokens, which is not understood"
            )
        for _ in tokens[1:]:
            tick()
        return [
            [Likely(None, name, logprob) for name, logprob in page.items()] if page else None
            for page in pages[: len(tokens) - 1]
        ]

    def details(self) -> dict[str, Any]:
        return {"version": self.ask("/openapi.json").get("info", {}).get("version")}


def text_of(bytes_: Sequence[int]) -> str:
    """As llama-cpp-python names a token: what is part of a character is left out."""
    return bytes(bytes_).decode("utf-8", errors="ignore")


def token_list(answer: Any, url: str) -> list[int]:
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(each, int) for each in tokens):
        raise ModelError(f"{url} did not answer with a list of tokens")
    return tokens


def ask(client: httpx.Client, url: str, body: Any = None) -> Any:
    """A GET, or a POST if there is a `body`. Raises ModelError."""
    try:
        response = client.get(url) if body is None else client.post(url, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ModelError(f"{url} does not answer: {error or type(error).__name__}") from None
    if response.status_code in (401, 403):
        raise ModelError(f"{url} asks for a key: pass --engine-key")
    try:
        answer = response.json()
    except ValueError:
        raise ModelError(f"{url} answered {response.status_code} without JSON") from None
    if response.status_code != 200:
        raise ModelError(f"{url} answered {response.status_code}: {str(answer)[:300]}")
    return answer


ENGINES: dict[str, type[Engine]] = {each.name: each for each in (VLLM, LlamaServer, LlamaCppPython)}


def connect(url: str, model: str | None, key: str | None, *, alias: bool = False) -> Engine:
    """Finds out which engine runs there. `model`: the name it serves, by default its first. Raises ModelError.

    With `alias`, an engine that serves only one model need not know the name.
    """
    url = url.rstrip("/")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    client = httpx.Client(headers=headers, timeout=TIMEOUT_S, trust_env=False)
    try:
        cards = ask(client, f"{url}/v1/models")["data"]
        names = [card["id"] for card in cards]
        owner = cards[0].get("owned_by")
    except (LookupError, TypeError, AttributeError):
        raise ModelError(f"{url} does not list its models as OpenAI does") from None
    if alias and len(names) == 1:
        model = None
    if model is not None and model not in names:
        raise ModelError(f"{url} does not serve {model}; it serves {', '.join(names)}")
    owners: dict[str, type[Engine]] = {"vllm": VLLM, "llamacpp": LlamaServer, "me": LlamaCppPython}
    kind = owners.get(owner)
    if kind is None:
        known = ", ".join(ENGINES)
        raise ModelError(f"{url} is not an engine that can be compared ({known}); a proxy is named with --url")
    return kind(client, url, model or names[0])
