"""Where each value comes from, and how errors name the setting and its correction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xgen_proxy.config.loading import ConfigError, ConfigSources, env_name, missing_secrets
from xgen_proxy.config.settings import Settings

FLAGS: dict[str, Any] = {"backends": {"vllm": {"urls": "http://gpu-1:8000"}}}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(flags: dict[str, Any]) -> dict[str, tuple[str, str]]:
    sources = ConfigSources(flags)
    return {setting: (value, origin) for setting, value, origin in sources.explain(sources.load())}


def problem(flags: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        ConfigSources(FLAGS if flags is None else flags).load()
    return str(error.value)


def test_each_value_has_its_source(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    (directory / "xgen-proxy.toml").write_text("drain_s = 5\n[routing]\nkv_full = 0.5\n[backends.vllm]\nslots = 9\n")
    (directory / ".env").write_text("XGEN_HOST=0.0.0.0\nXGEN_DRAIN_S=4\nXGEN_API_KEYS=none\n")
    secrets = directory / "secrets"
    secrets.mkdir()
    (secrets / "xgen_backends__vllm__api_key").write_text("sk-engine\n")
    monkeypatch.setenv("XGEN_SECRETS_DIR", str(secrets))
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
        "api_keys": ("none", ".env"),
        "backends.vllm.api_key": ("********", str(secrets)),
        "routing.kv_full": ("0.5", "xgen-proxy.toml"),
        "backends.vllm.slots": ("9", "xgen-proxy.toml"),
        "backends.vllm.dialect": ("vllm", "default"),
        "backends.vllm.device_class": ("gpu", "default"),
        "routing.urgent_load": ("0.7", "default"),
        "default_model": ("None", "default"),
    }
    assert {setting: found[setting] for setting in expected} == expected


def test_config_argument_overrides_the_environment(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "mine.toml").write_text("port = 7\nhost = '127.0.0.9'\n")
    (directory / "other.toml").write_text("port = 8\ndrain_s = 8\n")
    monkeypatch.setenv("XGEN_CONFIG", "other.toml")
    sources = ConfigSources(FLAGS, Path("mine.toml"))
    settings = sources.load()
    assert (settings.port, settings.host, settings.drain_s) == (7, "127.0.0.9", 30)
    assert ("port", "7", "mine.toml") in sources.explain(settings)
    assert sources.files() == [Path("mine.toml"), Path(".env")]
    assert ConfigSources(FLAGS).load().port == 8
    assert ConfigSources(FLAGS).files()[0] == Path("other.toml")


def test_config_argument_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"no\.toml does not exist"):
        ConfigSources(FLAGS, Path("no.toml")).load()


def test_files_include_secrets(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_SECRETS_DIR", str(directory))
    (directory / "xgen_api_keys").write_text("")
    (directory / "other").write_text("")
    assert ConfigSources().files() == [Path("xgen-proxy.toml"), Path(".env"), directory / "xgen_api_keys"]


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_invalid_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]) -> None:
    monkeypatch.setenv(name, value)
    message = problem()
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_every_problem_has_its_own_line() -> None:
    lines = problem({**FLAGS, "port": "x", "drain_s": -1}).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["port", "drain_s"]


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
def test_invalid_file(directory: Path, file: str, text: bytes, words: str) -> None:
    (directory / file).write_bytes(text)
    assert words in problem()


def test_variables_of_the_tests_are_not_typos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_TEST_SOMETHING", "1")
    assert ConfigSources(FLAGS).load().port == 8080


def test_env_name() -> None:
    assert env_name("backends.vllm.urls") == "XGEN_BACKENDS__VLLM__URLS"


# keys

HASH = "ab" * 32


@pytest.fixture
def secrets(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = directory / "secrets"
    made.mkdir()
    monkeypatch.setenv("XGEN_SECRETS_DIR", str(made))
    return made


def test_without_keys_only_a_loopback_address_is_served() -> None:
    assert ConfigSources(FLAGS).load().api_keys is None
    message = problem({**FLAGS, "host": "0.0.0.0"})
    assert "other machines can connect to 0.0.0.0" in message
    assert "`xgen-proxy key` makes a key" in message
    assert "XGEN_API_KEYS=none" in message
    for keys in ("none", [HASH]):
        assert ConfigSources({**FLAGS, "host": "0.0.0.0", "api_keys": keys}).load().api_keys == keys


def test_none_beside_keys_is_refused(secrets: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "xgen_api_keys").write_text(HASH)
    (directory / ".env").write_text("XGEN_API_KEYS=none\n")
    assert f"one source says none, but {secrets} has keys" in problem()
    (secrets / "xgen_api_keys").write_text("")
    assert ConfigSources(FLAGS).load().api_keys == "none"
    monkeypatch.setenv("XGEN_API_KEYS", HASH)
    assert ConfigSources(FLAGS).load().api_keys == [HASH], "keys are never weaker than none"


def make_unreadable(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As for another user. Modes do not hold back root, as whom tests may run."""
    real = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == path.name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("empty", "api_keys: it is empty"),
        ("half a hash", "api_keys: each entry is the SHA-256"),
        ("a cut list", "api_keys: each entry is the SHA-256"),
        ("half a JSON list", "api_keys"),
        ("no text", "not UTF-8"),
        ("a folder", "xgen_api_keys is a folder"),
        ("a dangling link", "xgen_api_keys is a link to a file that does not exist"),
        ("a link out of the folder", "xgen_api_keys is a link that leads out of its folder"),
        ("a link to itself", "xgen_api_keys cannot be read"),
        ("unreadable", "xgen_api_keys cannot be read: Permission denied"),
    ],
)
def test_a_damaged_key_file_is_an_error_also_on_loopback(
    secrets: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, state: str, words: str
) -> None:
    keys = secrets / "xgen_api_keys"
    texts = {"empty": "\n", "half a hash": HASH[:30], "a cut list": f"{HASH},{HASH[:9]}"}
    texts["half a JSON list"] = f'["{HASH}'
    (directory / "elsewhere").write_text(HASH)
    match state:
        case "no text":
            keys.write_bytes(b"\xff\xfe")
        case "a folder":
            keys.mkdir()
        case "a dangling link":
            keys.symlink_to("gone")
        case "a link out of the folder":
            keys.symlink_to(directory / "elsewhere")
        case "a link to itself":
            keys.symlink_to(keys)
        case "unreadable":
            keys.write_text(HASH)
            make_unreadable(monkeypatch, keys)
        case _:
            keys.write_text(texts[state])
    assert words in problem()


@pytest.mark.parametrize("value", ["5", "true", "{a = 1}", "[]", '""', '["none"]', "1979-05-27"])
def test_keys_of_another_type_are_one_problem(directory: Path, value: str) -> None:
    (directory / "xgen-proxy.toml").write_text(f"api_keys = {value}\n")
    [line] = problem().splitlines()
    assert line.startswith("api_keys: ")


@pytest.mark.parametrize("name", ["xgen-proxy.toml", ".env"])
def test_a_folder_in_place_of_a_file_is_an_error(directory: Path, name: str) -> None:
    (directory / name).mkdir()
    assert f"{name} is a folder" in problem()


def test_a_folder_of_secrets_that_cannot_be_listed_is_an_error(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"{secrets} cannot be read: Permission denied" in problem()
    assert ConfigSources(FLAGS).files() == [Path("xgen-proxy.toml"), Path(".env")]


def test_a_device_in_place_of_a_secret_is_no_secret(secrets: Path) -> None:
    """Compose mounts /dev/null where API_KEYS_FILE is not set."""
    assert not Path("/dev/null").is_file()
    (secrets / "other").symlink_to("/dev/null")
    assert ConfigSources(FLAGS).load().api_keys is None


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ({"api_keys": [HASH]}, {}, ["api_keys"]),
        ({"api_keys": "none"}, {}, ["api_keys"]),
        ({"api_keys": [HASH]}, {"api_keys": "none"}, []),
        ({"api_keys": [HASH]}, {"api_keys": ["cd" * 32]}, []),
        ({}, {"api_keys": [HASH]}, []),
        ({"backend": "sk-1"}, {}, ["backends.vllm.api_key"]),
        ({"backend": "sk-1"}, {"backend": "none"}, []),
        ({"backend": "sk-1"}, {"backend": "sk-2"}, []),
        ({"api_keys": [HASH], "backend": "sk-1"}, {}, ["api_keys", "backends.vllm.api_key"]),
    ],
)
def test_secrets_that_are_gone(old: dict[str, Any], new: dict[str, Any], missing: list[str]) -> None:
    def made(values: dict[str, Any]) -> Settings:
        key = {"api_key": values["backend"]} if "backend" in values else {}
        backends = {"vllm": {"urls": "http://gpu-1:8000", **key}}
        return Settings(backends=backends, **{name: value for name, value in values.items() if name != "backend"})

    assert missing_secrets(made(old), made(new)) == missing


def test_a_removed_backend_takes_its_key_along() -> None:
    old = Settings(backends={"vllm": {"urls": "http://a:1", "api_key": "sk-1"}})
    new = Settings(backends={"llama_cpp": {"urls": "http://b:1"}})
    assert missing_secrets(old, new) == []
