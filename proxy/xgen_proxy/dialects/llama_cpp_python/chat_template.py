"""A model's chat template, for llama-cpp-python, which cannot be asked to render one.

The file is a Hugging Face tokenizer_config.json: {chat_template, bos_token, eos_token, add_bos_token}.
https://huggingface.co/docs/transformers/chat_templating

Differences from Transformers: `tojson` escapes HTML, as Jinja's own does, and the extension `loopcontrols` is missing.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xgen_proxy.errors import UnsupportedByBackendError


class ChatTemplate:
    """`bos_token` is what the template writes; "" if the server puts it before every prompt itself."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """Raises ValueError if `source` is not a template."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"no chat template: {error}") from None
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt up to the beginning of the assistant's message. Raises UnsupportedByBackendError."""
        try:
            prompt: str = self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # templates raise errors of any kind for chats that they were not made for
            raise UnsupportedByBackendError(f"the chat template failed: {type(error).__name__}") from None
        return prompt


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def load_template(path: Path) -> ChatTemplate:
    """Raises ValueError, whose message says what is wrong with the file."""
    try:
        config = orjson.loads(path.read_bytes())
        bos = "" if config.get("add_bos_token", True) else _token(config, "bos_token")
        return ChatTemplate(config["chat_template"], bos, _token(config, "eos_token"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, orjson.JSONDecodeError):
        raise ValueError(f"{path} is no tokenizer_config.json with a chat_template in it") from None


def _token(config: dict[str, Any], name: str) -> str:
    """A string, or {content, …}."""
    token = config.get(name) or ""
    return str(token["content"]) if isinstance(token, dict) else str(token)
