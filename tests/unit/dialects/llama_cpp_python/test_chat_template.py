from __future__ import annotations

import json
from pathlib import Path

import pytest

from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate, load_template
from xgen_proxy.errors import UnsupportedByBackendError

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
HI = [{"role": "user", "content": "hi"}]


def test_renders_up_to_the_assistants_words() -> None:
    assert ChatTemplate(CHATML).render(HI) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("added", "prompt"), [(True, "hi"), (None, "hi"), (False, "<s>hi")])
def test_the_first_token_is_left_to_a_server_that_adds_it(tmp_path: Path, added: bool | None, prompt: str) -> None:
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<s>", "add_bos_token": added}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    assert load_template(path).render(HI) == prompt


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ messages[7].x.y }}", "{{ 1/0 }}"]
)
def test_a_template_that_refuses_is_a_failure_that_repeats_no_prompt(source: str) -> None:
    with pytest.raises(UnsupportedByBackendError, match=r"^the chat template failed: \w+$"):
        ChatTemplate(source).render([{"role": "user", "content": "secret"}])


def test_it_is_sandboxed() -> None:
    with pytest.raises(UnsupportedByBackendError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(HI)


def test_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HI).startswith("20")


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "special": True}, None])
def test_load(tmp_path: Path, token: object) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": "{{ eos_token }}", "eos_token": token}))
    assert load_template(path).render(HI) == ("</s>" if token else "")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"chat_template": 7}', '{"chat_template": "{% for %}"}'])
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="chat"):
        load_template(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        load_template(tmp_path / "missing.json")
