"""Where each value came from, and what is wrong with one, in words that name the setting and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xgen_proxy.config.loading import ConfigError, env_name, explain, load, use_file

FLAGS: dict[str, Any] = {"backends": {"vllm": {"urls": "http://gpu-1:8000"}}}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(flags: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {setting: (value, origin) for setting, value, origin in explain(load(flags), flags)}


def problem(flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load(FLAGS if flags is None else flags)
    return str(error.value)


def test_each_value_knows_its_source(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    (directory / "xgen-proxy.toml").write_text("drain_s = 5\n[routing]\nkv_full = 0.5\n[backends.vllm]\nslots = 9\n")
    (directory / ".env").write_text("XGEN_HOST=0.0.0.0\nXGEN_DRAIN_S=4\n")
    monkeypatch.setenv("XGEN_LIMITS__QUEUE", "7")
    monkeypatch.setenv("XGEN_BACKENDS__VLLM__CONTEXT", "4096")
    monkeypatch.setenv("XGEN_PORT", "1")
    found = rows({**FLAGS, "port": 8081})
    expected = {
        "port": ("8081", "flag"),
        "backends.vllm.urls": ("['http://gpu-1:8000']", "flag"),
        "limits.queue": ("7", "environment"),
        "backends.vllm.context": ("4096", "environment"),
        "host": ("0.0.0.0", ".env"),
        "drain_s": ("4.0", ".env"),
        "routing.kv_full": ("0.5", "xgen-proxy.toml"),
        "backends.vllm.slots": ("9", "xgen-proxy.toml"),
        "backends.vllm.dialect": ("vllm", "default"),
        "backends.vllm.device_class": ("gpu", "default"),
        "routing.urgent_load": ("0.7", "default"),
        "default_model": ("None", "default"),
    }
    assert {setting: found[setting] for setting in expected} == expected


def test_a_named_file_is_told_by_its_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "mine.toml").write_text("port = 7\n")
    monkeypatch.setenv("XGEN_CONFIG", "to be restored after the test")
    use_file("mine.toml")
    use_file(None)  # no --config: as it was
    assert rows(FLAGS)["port"] == ("7", "mine.toml")


def test_secrets_are_masked_wherever_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_BACKENDS__VLLM__API_KEY", "hush-hush")
    found = rows(FLAGS)
    assert found["backends.vllm.api_key"] == ("********", "environment")
    assert "hush" not in str(found)
    monkeypatch.setenv("XGEN_PORT", "x")
    assert "hush" not in problem()


def test_no_backend() -> None:
    assert "--vllm URL or --llama-cpp URL" in problem({})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("XGEN_PROT", "1", ["XGEN_PROT is not a setting", "did you mean XGEN_PORT?"]),
        ("XGEN_QQQQQQ", "1", ["XGEN_QQQQQQ is not a setting", "XGEN_BACKENDS"]),
        ("XGEN_PORT", "70000", ["port:", "65535", "XGEN_PORT"]),
        ("XGEN_ROUTING__LONG_WORDS", "1", ["routing.long_words: there is no such setting"]),
        ("XGEN_ROUTING", "{", ["routing", "write JSON, or set each part"]),
        ("XGEN_BACKENDS__MINE__URLS", "http://a:1", ["backends.mine.dialect: say what it speaks: vllm"]),
        ("XGEN_BACKENDS__LLAMA_CPP__SLOTS", "1", ["backends.llama_cpp.urls: say where it is", "LLAMA_CPP__URLS"]),
        ("XGEN_BACKENDS__LLAMA_CPP__URLS", "http://a:1/v1", ["backends.llama_cpp.urls: 'http://a:1/v1' is not a"]),
        ("XGEN_API_KEYS", "sk-1", ["api_keys: each entry is the SHA-256", "`xgen-proxy key` makes one"]),
        ("XGEN_CONFIG", "no.toml", ["no.toml does not exist", "--config or XGEN_CONFIG"]),
    ],
)
def test_what_is_wrong_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    told = problem()
    assert [word for word in words if word not in told] == []
    assert "\n" not in told


def test_every_problem_has_a_line_of_its_own() -> None:
    told = problem({**FLAGS, "port": "x", "drain_s": -1}).splitlines()
    assert [line.partition(":")[0] for line in told] == ["port", "drain_s"]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("xgen-proxy.toml", b"port ==", "xgen-proxy.toml is not valid TOML"),
        ("xgen-proxy.toml", b"\xff\xfe", "not UTF-8"),
        ("xgen-proxy.toml", b"prot = 1", "prot: there is no such setting"),
        ("xgen-proxy.toml", b"[limits]\nqueu = 1", "limits.queu: there is no such setting"),
        (".env", b"XGEN_PROT=1", "in .env, XGEN_PROT is not a setting; did you mean XGEN_PORT?"),
        (".env", b"XGEN_PORT=x", "port: Input should be a valid integer"),
        (".env", b"\xff\xfe=1", "not UTF-8"),
    ],
)
def test_what_is_wrong_in_a_file(directory: Path, file: str, text: bytes, words: str) -> None:
    (directory / file).write_bytes(text)
    assert words in problem()


def test_the_names_of_the_tests_own_variables_are_no_typos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_TEST_SOMETHING", "1")
    assert load(FLAGS).port == 8080


def test_names_in_the_environment() -> None:
    assert env_name("backends.vllm.urls") == "XGEN_BACKENDS__VLLM__URLS"
