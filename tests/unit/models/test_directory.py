"""The folder of models: what is in it, what is damaged, and what a name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.config.loading import ConfigSources
from xgen_proxy.models.directory import entries, find_model, models_folder
from xgen_proxy.models.errors import UsageError


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XGEN_MODELS_DIR", raising=False)
    assert models_folder() == Path("models")
    monkeypatch.setenv("XGEN_MODELS_DIR", "/srv/models")
    assert models_folder() == Path("/srv/models")
    assert models_folder("here") == Path("here")
    ConfigSources({"backends": {"vllm": {"urls": "http://a:1"}}}).load()  # no unknown setting for the proxy


def test_models_damaged_files_and_unfinished_downloads(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[:-3000])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    (tmp_path / ".d.gguf.0123456789ab.part").write_bytes(whole[:10])
    (tmp_path / "notes.txt").write_text("")
    for gone in (".gone.gguf.0123456789ab.part", "f.gguf", "g"):
        (tmp_path / gone).symlink_to(tmp_path / "gone")
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "config.json").write_text("{}")
    (tmp_path / "h" / "model.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "e-00002-of-00002.gguf").write_bytes(whole)  # belongs to the first part
    found = {each.path.name: each for each in entries(tmp_path)}
    parts = [".d.gguf.0123456789ab.part", ".gone.gguf.0123456789ab.part"]
    assert sorted(found) == [*parts, "a.gguf", "b.gguf", "c", "f.gguf", "h"]
    assert "there is no" in found["f.gguf"].problem
    assert "cannot read" in found["h"].problem
    assert found["a.gguf"].model
    assert found["a.gguf"].model.quantization == "F16"
    assert "is cut short" in found["b.gguf"].problem
    assert "has no .safetensors" in found["c"].problem
    assert found[".d.gguf.0123456789ab.part"].problem == "unfinished download of d.gguf; pull it again to go on"


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the folder .*`xgen-proxy models pull`.*XGEN_MODELS_DIR"):
        list(entries(tmp_path / "none"))


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_MODELS_DIR", str(tmp_path))
    path = tiny_gguf(tmp_path / "tiny.gguf")
    assert find_model("tiny") == find_model("tiny.gguf") == find_model(str(path)) == path
    with pytest.raises(UsageError, match="there is no model other, here or in"):
        find_model("other")
