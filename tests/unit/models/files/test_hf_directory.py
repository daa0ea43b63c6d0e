"""Hugging Face directories: config.json and the headers of safetensors files."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from xgen_proxy.models.errors import ModelFileError
from xgen_proxy.models.files.hf_directory import read_hf_directory


def safetensors(path: Path, **tensors: tuple[str, list[int], int]) -> None:
    """Each tensor: its type, its shape, its size in bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(at))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 8}}))
    safetensors(tmp_path / "model.safetensors", a=("BF16", [4, 8], 64), b=("F32", [8], 32))
    return tmp_path


def test_a_directory(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ tools }}")
    found = read_hf_directory(folder)
    assert (found.weights, found.weight_bytes, found.types) == (40, 96, {"BF16": 1, "F32": 1})
    assert found.text_config == {"hidden_size": 8}
    assert found.chat_templates == {"default": "{{ tools }}"}


def test_templates_with_names(folder: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert read_hf_directory(folder).chat_templates == {"default": "a", "tool_use": "b"}


def test_a_missing_file_of_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"lacks model-2\.safetensors; fetch it again"):
        read_hf_directory(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "cannot read"),
        ("config.json", "[]", "contains no JSON object"),
        ("model.safetensors", "", "is cut short"),
        ("model.safetensors", "\2" + "\0" * 7 + "[]", "makes no sense"),
        ("model.safetensors.index.json", "{}", "names no files of weights"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "names no files of weights"),
        ("model.safetensors", "\xff" * 20, "is cut short"),
    ],
)
def test_damage(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelFileError, match=message):
        read_hf_directory(folder)


def test_files_that_the_index_does_not_name_are_not_the_models(folder: Path) -> None:
    before = read_hf_directory(folder)
    safetensors(folder / "consolidated.safetensors", a=("BF16", [4, 8], 64))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert read_hf_directory(folder) == before


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "x", [], ["x"], [-1, 2], [5, 4], {}, 2**63])
@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets", "all"])
def test_a_header_of_any_form_is_read_or_refused(folder: Path, key: str, value: Any) -> None:
    tensor = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
    header = json.dumps({"a": value if key == "all" else {**tensor, key: value}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with contextlib.suppress(ModelFileError):
        assert read_hf_directory(folder).weight_bytes == 4


def test_a_cut_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="is damaged: it has"):
        read_hf_directory(folder)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no config\.json"):
        read_hf_directory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"has no \.safetensors files"):
        read_hf_directory(tmp_path)
