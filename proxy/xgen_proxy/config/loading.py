"""Loads the settings, knows where each value came from, and says in words what is wrong with one."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource, SettingsError

from xgen_proxy.config.settings import URL_FORMS, Settings, config_file, secrets_dir, secrets_source

NOT_SETTINGS = ("XGEN_CONFIG", "XGEN_SECRETS_DIR", "XGEN_TEST_")  # the file's own name, and what the tests are told


class ConfigError(Exception):
    """The message names the setting and the remedy, one problem a line."""


def load(flags: Mapping[str, Any]) -> Settings:
    """`flags`: from the command line, nested as the settings are. Raises ConfigError."""
    path = config_file()
    if "XGEN_CONFIG" in os.environ and not path.is_file():
        raise ConfigError(f"the configuration file {path} does not exist; mend --config or XGEN_CONFIG")
    _check_names(os.environ, "the environment variable")
    settings = _read(flags, path)
    if not settings.backends:
        raise ConfigError(
            "no backend is configured: pass --vllm URL or --llama-cpp URL, or set XGEN_BACKENDS__VLLM__URLS"
            " or XGEN_BACKENDS__LLAMA_CPP__URLS"
        )
    return settings


def _read(flags: Mapping[str, Any], path: Path) -> Settings:
    try:
        _check_names((name.upper() for name in DotEnvSettingsSource(Settings).env_vars), "in .env,")
        _check_names((name.upper() for name in secrets_source(Settings).env_vars), f"in {secrets_dir()},")
        return Settings(**flags)
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(each) for each in error.errors())) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} or .env is not UTF-8: {error.reason} at byte {error.start}") from None
    except SettingsError as error:
        raise ConfigError(f"{error}: write JSON, or set each part, as in XGEN_ROUTING__KV_FULL=0.9") from None


def _check_names(names: Iterable[str], where: str) -> None:
    known = [f"XGEN_{name.upper()}" for name in Settings.model_fields]
    for name in names:
        top = name.partition("__")[0]
        if name.startswith("XGEN_") and top not in known and not name.startswith(NOT_SETTINGS):
            near = difflib.get_close_matches(top, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ConfigError(f"{where} {name} is no setting{hint}")


def _problem(error: Any) -> str:
    setting = ".".join(str(part) for part in error["loc"]) or "settings"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing" and setting.endswith("dialect"):
        message = "say what it speaks: vllm, llama-cpp-python, llama-server or openai"
    elif error["type"] in ("missing", "too_short") and setting.endswith("urls"):
        message = f"say where it is: {URL_FORMS}; several with commas"
    elif error["type"] == "extra_forbidden":
        message = "there is no such setting"
    return f"{setting}: {message} (set it by flag, in the environment as {env_name(setting)}, or in {config_file()})"


def env_name(setting: str) -> str:
    return "XGEN_" + setting.upper().replace(".", "__")


def explain(settings: Settings, flags: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(setting, value, where it came from) for every value; secrets are masked."""
    origins = _origins(flags)
    for setting, value in _leaves(settings):
        text = str(value)
        origin = next((name for name, values in origins if _holds(values, setting)), "default")
        yield setting, text, origin


def _origins(flags: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    path = config_file()
    file = tomllib.loads(path.read_text()) if path.is_file() else {}
    return [
        ("flag", flags),
        ("environment", EnvSettingsSource(Settings)()),
        (".env", DotEnvSettingsSource(Settings)()),
        (str(secrets_dir()), secrets_source(Settings)()),
        (str(path), file),
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict) and value and all(isinstance(each, BaseModel) for each in value.values()):
        items = list(value.items())
    else:
        yield prefix, "********" if isinstance(value, SecretStr) else value
        return
    for name, each in items:
        yield from _leaves(each, f"{prefix}.{name}" if prefix else str(name))


def _holds(values: Any, setting: str) -> bool:
    for part in setting.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def use_file(path: str | None) -> None:
    if path is not None:
        os.environ["XGEN_CONFIG"] = str(Path(path))
