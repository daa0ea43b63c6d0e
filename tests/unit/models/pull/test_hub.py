"""Which files of a repository are the model."""

from __future__ import annotations

import re

import pytest

from tests.support.scripted_hub import Hub
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.pull.download import client
from xgen_proxy.models.pull.hub import HubFile, Reference, choose, list_files, parse_reference

REPO = Reference("OWNER/REPO", None, "main")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OWNER/REPO", Reference("OWNER/REPO", None, "main")),
        ("hf:OWNER/REPO", Reference("OWNER/REPO", None, "main")),
        ("hf:OWNER/REPO@v1", Reference("OWNER/REPO", None, "v1")),
        ("hf:OWNER/REPO/a/b.gguf@refs/pr/1", Reference("OWNER/REPO", "a/b.gguf", "refs/pr/1")),
        ("model", None),
        ("OWNER/", None),
    ],
)
def test_references(text: str, expected: Reference | None) -> None:
    assert parse_reference(text) == expected


def files(*names: str) -> list[HubFile]:
    return [HubFile(name, 2_000_000, None) for name in names]


def test_the_only_gguf_is_the_model() -> None:
    assert choose(REPO, files("README.md", "m.gguf")) == (False, files("m.gguf"))


def test_several_ggufs_are_a_choice() -> None:
    names = re.escape("choose one: hf:OWNER/REPO/a.gguf (2 MB), hf:OWNER/REPO/b.gguf (2 MB)")
    with pytest.raises(ModelError, match=names):
        choose(REPO, files("a.gguf", "b.gguf"))


def test_all_parts_of_a_split_model() -> None:
    parts = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert choose(REPO, files(*parts)) == (False, files(*parts))
    first = Reference("OWNER/REPO", parts[0], "main")
    assert choose(first, files(*parts, "other.gguf")) == (False, files(*parts))


def test_a_directory_has_what_vllm_needs_but_neither_a_second_copy_of_the_weights_nor_code() -> None:
    wanted = files("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    others = files("pytorch_model.bin", "onnx/model.onnx", "README.md", "modeling_m.py")
    assert choose(REPO, [*wanted, *others]) == (True, wanted)


def test_weights_are_not_fetched_twice() -> None:
    """Mistral's repositories have the weights also in a form of their own."""
    wanted = files("config.json", "model-00001-of-00001.safetensors", "params.json")
    assert choose(REPO, [*wanted, *files("consolidated.safetensors")]) == (True, wanted)
    only = files("params.json", "consolidated-00001-of-00001.safetensors")
    assert choose(REPO, only) == (True, only)


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"neither GGUF nor safetensors.*README\.md"):
        choose(REPO, files("README.md"))
    with pytest.raises(ModelError, match=r"has no x\.gguf; it has a\.gguf"):
        choose(Reference("OWNER/REPO", "x.gguf", "main"), files("a.gguf"))


def test_files_are_listed_with_their_checksums(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "m.gguf": b"GGUF"}
    with client() as http:
        config, model = list_files(http, REPO)
    assert (config.size, config.sha256, model.size) == (2, None, 4)
    assert model.sha256
    assert len(model.sha256) == 64


@pytest.mark.parametrize(("status", "message"), [(404, "HF_TOKEN"), (503, "try again later")])
def test_a_hub_that_refuses(hub: Hub, status: int, message: str) -> None:
    hub.status = status
    with client() as http, pytest.raises(ModelError, match=message):
        list_files(http, REPO)


def test_a_path_out_of_the_folder_is_refused(hub: Hub) -> None:
    hub.files = {"../../evil.gguf": b"GGUF"}
    with client() as http, pytest.raises(ModelError, match="check HF_ENDPOINT"):
        list_files(http, REPO)


@pytest.mark.parametrize("elsewhere", ["https://evil.example/next", "http://127.0.0.1:1/next", "http://[/"])
def test_the_list_goes_on_only_where_it_began(hub: Hub, elsewhere: str) -> None:
    """The token would be sent there."""
    hub.files, hub.link = {"m.gguf": b"GGUF"}, f'<{elsewhere}>; rel="next"'
    with (
        client("hush") as http,
        pytest.raises(ModelError, match=r"names (a next page on|no valid next page).*HF_ENDPOINT"),
    ):
        list_files(http, REPO)


def test_the_list_has_several_pages(hub: Hub) -> None:
    hub.files, hub.link = {"m.gguf": b"GGUF"}, '</api/models/OWNER/REPO/tree/main?cursor=2>; rel="next"'
    with client() as http:
        assert [file.path for file in list_files(http, REPO)] == ["m.gguf", "m.gguf"]


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with client() as http, pytest.raises(ModelError, match=r"cannot reach Hugging Face.*HF_ENDPOINT to a mirror"):
        list_files(http, REPO)
