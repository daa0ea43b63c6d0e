"""Loads the settings, reports where each value came from, and explains invalid ones.

There are five sources, highest priority first: command-line flags, environment variables, `.env`, the secrets directory
and a TOML file.
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource, SettingsError

from xgen_proxy.config.settings import (
    NO_KEYS,
    URL_FORMS,
    Settings,
    config_file,
    secrets_dir,
    secrets_source,
    settings_with_file,
)
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.values import frozen

# Two sources' own locations, the folder of `xgen-proxy models`, and the tests' variables.
NOT_SETTINGS = ("XGEN_CONFIG", "XGEN_SECRETS_DIR", "XGEN_MODELS_DIR", "XGEN_TEST_")


class ConfigError(Exception):
    """The message names each setting that is wrong and how to correct it, one problem per line."""


class UnreadableError(ConfigError):
    """A file is there and cannot be read now."""


@frozen
class ConfigSources:
    """The sources of one process. `flags` are nested like the settings. `config`: the path that `--config` gave, which
    overrides XGEN_CONFIG and the default."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    config: Path | None = None

    @property
    def config_file(self) -> Path:
        return self.config or config_file()

    def files(self) -> list[Path]:
        """The files that settings may come from, whether they exist or not."""
        try:
            secrets = _secret_files()
        except OSError:  # load() reports it
            secrets = []
        return [self.config_file, Path(".env"), *secrets]

    def load(self) -> Settings:
        """Read all sources again. Raises ConfigError."""
        try:
            return self._load()
        except OSError as error:
            what = error.filename or "a file with settings"
            raise UnreadableError(f"{what} cannot be read: {error.strerror or error}") from None

    def _load(self) -> Settings:
        path = self.config_file
        if (self.config or "XGEN_CONFIG" in os.environ) and not path.is_file():
            raise ConfigError(f"the configuration file {path} does not exist; correct --config or XGEN_CONFIG")
        for file in (path, Path(".env"), *_secret_files()):
            _check_file(file)
        _check_names(os.environ, "the environment variable")
        settings = self._read(path)
        if not settings.backends:
            raise ConfigError(
                "no backend is configured: pass --vllm URL or --llama-cpp URL, or set XGEN_BACKENDS__VLLM__URLS"
                " or XGEN_BACKENDS__LLAMA_CPP__URLS"
            )
        self._check_keys(settings)
        return settings

    def _check_keys(self, settings: Settings) -> None:
        """Running without keys is never an accident: it takes a loopback address, or the word none and no key."""
        if settings.api_keys is None and not settings.is_local:
            raise ConfigError(
                f"api_keys: none are set, and other machines can connect to {settings.host or 'all addresses'}."
                " `xgen-proxy key` makes a key; set its hash as XGEN_API_KEYS or in the secrets file xgen_api_keys."
                " If no key is to be asked for, set XGEN_API_KEYS=none"
            )
        if settings.api_keys == NO_KEYS:
            for origin, values in self._origins():
                if values.get("api_keys") not in (None, "", [], NO_KEYS):
                    raise ConfigError(f"api_keys: one source says none, but {origin} has keys; remove one of them")

    def _read(self, path: Path) -> Settings:
        try:
            _check_names((name.upper() for name in DotEnvSettingsSource(Settings).env_vars), "in .env,")
            _check_names((name.upper() for name in secrets_source(Settings).env_vars), f"in {secrets_dir()},")
            return settings_with_file(path)(**self.flags)
        except ValidationError as error:
            raise ConfigError("\n".join(_problem(each, path) for each in error.errors())) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} or .env is not UTF-8: {error.reason} at byte {error.start}") from None
        except SettingsError as error:
            raise ConfigError(f"{error}: write JSON, or set each part, as in XGEN_ROUTING__KV_FULL=0.9") from None

    def explain(self, settings: Settings) -> Iterator[tuple[str, str, str]]:
        """(setting, value, source) for every value; secrets are masked."""
        origins = self._origins()
        for path, value in _leaves(settings):
            origin = next((name for name, values in origins if _contains(values, path)), "default")
            yield ".".join(path), str(value), origin

    def _origins(self) -> list[tuple[str, Mapping[str, Any]]]:
        path = self.config_file
        return [
            ("flag", self.flags),
            ("environment", EnvSettingsSource(Settings)()),
            (".env", DotEnvSettingsSource(Settings)()),
            (str(secrets_dir()), secrets_source(Settings)()),
            (str(path), tomllib.loads(path.read_text()) if path.is_file() else {}),
        ]


def _secret_files() -> list[Path]:
    """Raises OSError if the directory is there and cannot be listed: its keys would seem to be gone."""
    try:
        return sorted(path for path in secrets_dir().iterdir() if path.name.lower().startswith("xgen_"))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _check_file(path: Path) -> None:
    """The libraries that read the sources skip what is no file, so that the settings in it would seem to be gone.

    Raises OSError. A device such as /dev/null has no settings: Compose mounts it in place of a secret that is not set.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to a file that does not exist") from None
        return
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{path} is a folder; it must be a file")
    if path.name.lower().startswith("xgen_") and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ConfigError(f"{path} is a link that leads out of its folder, where secrets are not read from")


def doubts(settings: Settings) -> Iterator[str]:
    """What is valid and yet cannot be meant, as far as the settings alone tell: a backend without `models` serves the
    names that it lists itself."""
    served = {name for backend in settings.backends.values() for name in backend.models}
    if all(backend.models for backend in settings.backends.values()):
        for pattern, alias in settings.models.aliases.items():
            if alias.model not in served:
                known = ", ".join(sorted(served))
                yield f"models.aliases.{pattern}: no backend serves {alias.model!r}; there are {known}"


def missing_secrets(old: Settings, new: Settings) -> list[str]:
    """The keys that `old` has and `new` no longer mentions. To take one away, the settings must say `none`."""
    missing = ["api_keys"] if old.api_keys is not None and new.api_keys is None else []
    for name, backend in new.backends.items():
        had_key = name in old.backends and old.backends[name].api_key is not None
        if had_key and "api_key" not in backend.model_fields_set:
            missing.append(f"backends.{name}.api_key")
    return missing


def _check_names(names: Iterable[str], where: str) -> None:
    known = [f"XGEN_{name.upper()}" for name in Settings.model_fields]
    for name in names:
        top = name.partition("__")[0]
        if name.startswith("XGEN_") and top not in known and not name.startswith(NOT_SETTINGS):
            near = difflib.get_close_matches(top, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ConfigError(f"{where} {name} is not a setting{hint}")


def _problem(error: Any, path: Path) -> str:
    """`error`: one of ValidationError.errors()."""
    setting = ".".join(str(part) for part in error["loc"]) or "settings"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing" and setting.endswith("dialect"):
        message = f"say what it speaks: {', '.join(DIALECTS)}"
    elif error["type"] in ("missing", "too_short") and setting.endswith("urls"):
        message = f"say where it is: {URL_FORMS}; several with commas"
    elif error["type"] == "extra_forbidden":
        message = "there is no such setting"
    return f"{setting}: {message} (set it by flag, in the environment as {env_name(setting)}, or in {path})"


def env_name(setting: str) -> str:
    return "XGEN_" + setting.upper().replace(".", "__")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict) and value and all(isinstance(each, BaseModel) for each in value.values()):
        items = list(value.items())
    else:
        yield path, "********" if isinstance(value, SecretStr) else value
        return
    for name, each in items:
        yield from _leaves(each, (*path, str(name)))


def _contains(values: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if isinstance(values, str):  # the short form of what has parts, such as an alias
            return True
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
