"""The values that each setting accepts and rejects, in each way of writing them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from xgen_proxy.config.aliases import Alias, Models
from xgen_proxy.config.fallback import Fallback
from xgen_proxy.config.memory_guard import MemoryGuard
from xgen_proxy.config.settings import BackendSettings, Routing, Settings, check_url, split_commas
from xgen_proxy.request.limits import Limits

URL = {"XGEN_BACKENDS__VLLM__URLS": "http://gpu-1:8000"}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No .env and no xgen-proxy.toml except those that a test writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def from_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in {**URL, **values}.items():
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (" a , b ,", ["a", "b"]),
        ("", []),
        ('["a", "b"]', ["a", "b"]),
        (["a"], ["a"]),
        (None, None),
    ],
)
def test_lists_with_commas_or_as_json(written: object, read: object) -> None:
    assert split_commas(written) == read


@pytest.mark.parametrize("url", ["http://a:1", "http://a", "http://127.0.0.1:8000", "http://[::1]:80", "http://a:1/"])
def test_valid_backend_url(url: str) -> None:
    assert check_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "a:1",
        "https://a:1",
        "http://",
        "http://a:1/v1",
        "http://a:x",
        "http://a:99999",
        "http://a:0",
        "http://a?b=1",
        "http://[::1",
        "ftp://a",
        "",
    ],
)
def test_invalid_backend_url(url: str) -> None:
    with pytest.raises(ValueError, match="write http://HOST:PORT"):
        check_url(url)


def test_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="no credentials") as error:
        check_url("http://me:hush@a:1")
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "dialect", "device_class"), [("vllm", "vllm", "gpu"), ("llama_cpp", "llama-cpp-python", "cpu")]
)
def test_known_names_need_only_urls(name: str, dialect: str, device_class: str) -> None:
    backend = Settings(backends={name: {"urls": "http://a:1"}}).backends[name]
    assert (backend.dialect, backend.device_class, backend.urls) == (dialect, device_class, ["http://a:1"])


def test_other_names_need_a_dialect_and_may_set_a_device_class() -> None:
    backends = {
        "big": {"urls": "http://a:1", "dialect": "openai"},
        "small": {"urls": "http://b:1", "dialect": "llama-server"},
        "odd": {"urls": "http://c:1", "dialect": "llama-server", "device_class": "gpu"},
    }
    settings = Settings(backends=backends)
    assert {name: each.device_class for name, each in settings.backends.items()} == {
        "big": "gpu",
        "small": "cpu",
        "odd": "gpu",
    }
    with pytest.raises(ValidationError):
        Settings(backends={"big": {"urls": "http://a:1"}})


def test_arguments_are_not_modified() -> None:
    flags: dict[str, Any] = {"backends": {"vllm": {"urls": "http://a:1"}}}
    Settings(**flags)
    assert flags == {"backends": {"vllm": {"urls": "http://a:1"}}}


def test_nested_values_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_environment(
        monkeypatch,
        XGEN_BACKENDS__VLLM__URLS="http://a:1,http://b:2",
        XGEN_BACKENDS__VLLM__MODELS='{"gpt-4": "llama"}',
        XGEN_BACKENDS__VLLM__SLOTS="8",
        XGEN_ROUTING__LONG_PROMPT_WORDS="200",
        XGEN_PORT="81",
    )
    backend = settings.backends["vllm"]
    assert backend.urls == ["http://a:1", "http://b:2"]
    assert (backend.models, backend.slots, settings.port) == ({"gpt-4": "llama"}, 8, 81)
    assert settings.routing.long_prompt_words == 200
    assert settings.routing.long_max_tokens == 1024


def test_priority_of_sources_applies_to_each_value(monkeypatch: pytest.MonkeyPatch, empty_directory: Path) -> None:
    (empty_directory / "xgen-proxy.toml").write_text(
        'host = "file"\nport = 1\ndrain_s = 1\nscrape_timeout_s = 1\n'
        '[backends.vllm]\nurls = ["http://file:1"]\nslots = 3\ncontext = 4\n'
    )
    (empty_directory / ".env").write_text("XGEN_PORT=2\nXGEN_DRAIN_S=2\nXGEN_HOST=dotenv\n")
    monkeypatch.setenv("XGEN_PORT", "3")
    monkeypatch.setenv("XGEN_HOST", "environment")
    monkeypatch.setenv("XGEN_BACKENDS__VLLM__SLOTS", "5")
    settings = Settings(host="flag", backends={"vllm": {"urls": "http://flag:1"}})
    assert (settings.host, settings.port, settings.drain_s, settings.scrape_timeout_s) == ("flag", 3, 2, 1)
    backend = settings.backends["vllm"]
    assert (backend.urls, backend.slots, backend.context) == (["http://flag:1"], 5, 4)


def test_path_of_the_file_from_the_environment(monkeypatch: pytest.MonkeyPatch, empty_directory: Path) -> None:
    (empty_directory / "other.toml").write_text("port = 7\n")
    monkeypatch.setenv("XGEN_CONFIG", "other.toml")
    assert Settings().port == 7


def test_other_variables_in_env_files_are_ignored(empty_directory: Path) -> None:
    (empty_directory / ".env").write_text("HF_TOKEN=abc\nXGEN_PORT=7\n")
    assert Settings().port == 7


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("XGEN_PORT", "65536"),
        ("XGEN_LOG_FORMAT", "xml"),
        ("XGEN_DRAIN_S", "-1"),
        ("XGEN_ROUTING__KV_FULL", "1.5"),
        ("XGEN_ROUTING__MAX_ATTEMPTS", "0"),
        ("XGEN_LIMITS__BODY_BYTES", "10"),
        ("XGEN_BACKENDS__VLLM__URLS", "http://a:1,http://a:1/"),
        ("XGEN_BACKENDS__VLLM__URLS", ","),
        ("XGEN_BACKENDS__VLLM__SLOTS", "0"),
        ("XGEN_BACKENDS__VLLM__DIALECT", "tgi"),
        ("XGEN_BACKENDS__VLLM__TYPO", "1"),
        ("XGEN_ROUTING__TYPO", "1"),
        ("XGEN_API_KEYS", "sk-the-key-itself"),
        ("XGEN_API_KEYS", "z" * 64),
        ("XGEN_API_KEYS", ""),
        ("XGEN_API_KEYS", " , "),
        ("XGEN_API_KEYS", "[]"),
        ("XGEN_API_KEYS", "[1]"),
        ("XGEN_API_KEYS", '["none"]'),
        ("XGEN_API_KEYS", f"none,{'a' * 64}"),
        ("XGEN_API_KEYS", "null"),
        ("XGEN_BACKENDS__VLLM__API_KEY", ""),
        ("XGEN_BACKENDS__VLLM__API_KEY", "two words"),
        ("XGEN_BACKENDS__VLLM__API_KEY", "sk-1\r\nx: y"),
    ],
)
def test_invalid_values_are_rejected(monkeypatch: pytest.MonkeyPatch, setting: str, value: str) -> None:
    from_environment(monkeypatch)
    with pytest.raises(ValidationError):
        from_environment(monkeypatch, **{setting: value})


def test_hashes_of_keys_are_lowercased(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_environment(monkeypatch, XGEN_API_KEYS=f"{'A' * 64},{'b' * 64}")
    assert settings.api_keys == ["a" * 64, "b" * 64]


@pytest.mark.parametrize("keys", [None, "none", "NONE", " none\n"])
def test_no_keys_is_said_in_a_word(keys: str | None) -> None:
    values: dict[str, Any] = {} if keys is None else {"api_keys": keys}
    assert Settings(**values).api_keys == (keys and "none")


HEX = "0123456789abcdefABCDEF"


@given(st.text(alphabet=HEX + ",;[]\"' nonegz\n\0", max_size=200) | st.text(max_size=80))
@settings(max_examples=150)
@example("")
@example(f"{'a' * 64},")
@example(f"{'a' * 64},{'b' * 30}")
def test_a_text_gives_hashes_or_the_word_or_an_error(text: str) -> None:
    """No text, half-written or not, means "no key" but the word itself."""
    try:
        read = Settings(api_keys=text).api_keys
    except ValidationError:
        return
    if read == "none":
        assert text.strip().lower() == "none"
    else:
        assert read
        assert all(re.fullmatch("[0-9a-f]{64}", each) for each in read)


def test_the_key_of_a_backend() -> None:
    def read(key: str) -> SecretStr | None:
        return Settings(backends={"vllm": {"urls": "http://a:1", "api_key": key}}).backends["vllm"].api_key

    assert read(" sk-engine\n") == SecretStr("sk-engine")
    assert read("none") is None


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("127.1", False),
        ("localhost.example", False),
    ],
)
def test_only_a_loopback_address_is_local(host: str, local: bool) -> None:
    assert Settings(host=host).is_local == local


def test_every_setting_has_a_description() -> None:
    for model in (Settings, BackendSettings, Models, Alias, Routing, Fallback, Limits, MemoryGuard):
        for name, field in model.model_fields.items():
            assert field.description or name in ("models", "routing", "fallback", "limits", "memory_guard"), name
