"""Every setting: its unit, its default, its reason.

Values come from five sources, highest priority first:

1. command-line flags
2. environment variables: `XGEN_…`, nested with `__`
3. `.env`, with the same names
4. the secrets directory, /run/secrets or XGEN_SECRETS_DIR: files with the same names in lower case
5. a TOML file: `--config`, XGEN_CONFIG or ./xgen-proxy.toml

`xgen-proxy check` prints each value with its source.
"""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from xgen_proxy.config.aliases import Models
from xgen_proxy.config.fallback import Fallback
from xgen_proxy.config.memory_guard import MemoryGuard
from xgen_proxy.dialects.llama_cpp_python.chat_template import load_template
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.request.features import DeviceClass
from xgen_proxy.request.limits import Limits

DEFAULT_CONFIG = Path("xgen-proxy.toml")
DEFAULT_SECRETS = Path("/run/secrets")  # where Docker Compose mounts them


def split_commas(value: Any) -> Any:
    """Accept `a,b` for a list as well as JSON, which is awkward to quote in an environment variable."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [item.strip() for item in value.split(",") if item.strip()]


NO_KEYS: Literal["none"] = "none"


def read_key_hashes(value: Any) -> Any:
    """An empty value is refused: it is what a truncated file, a deleted secret or an unset variable leaves behind."""
    if isinstance(value, str) and value.strip().lower() == NO_KEYS:
        return NO_KEYS
    hashes = split_commas(value)
    if hashes is None:
        return None
    if not isinstance(hashes, list):
        raise ValueError("write hashes, comma-separated or as a list, or the word none")
    if not hashes:
        raise ValueError("it is empty; write the hash that `xgen-proxy key` prints, or the word none")
    for each in hashes:
        if not isinstance(each, str) or len(each) != 64 or not set(each.lower()) <= set("0123456789abcdef"):
            raise ValueError("each entry is the SHA-256 of a key in hex, never the key; `xgen-proxy key` makes one")
    return [each.lower() for each in hashes]


def read_backend_key(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    key = value.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("it is empty or has characters that no header may have; write the word none for no key")
    return None if key.lower() == NO_KEYS else key


def check_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host = rest.rstrip("/")
    forms = {"http": _has_good_port, "dns": _has_a_port, "srv": _is_a_name}
    if not host or set(host) & set("/@?#") or scheme not in forms or not forms[scheme](url):
        shown = repr(url) if "@" not in url else "what is set"  # it may contain a password
        raise ValueError(f"{shown} is not a backend URL; write {URL_FORMS} (no path, no credentials, no TLS)")
    return f"{scheme}://{host}"


URL_FORMS = "http://HOST:PORT, dns://HOST:PORT for each address of the name, or srv://NAME for its SRV records"


def _has_good_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # not a number, or over 65535
        return False


def _has_a_port(url: str) -> bool:
    return _has_good_port(url) and urlsplit(url).port is not None


def _is_a_name(url: str) -> bool:
    return ":" not in urlsplit(url).netloc


DIALECT_NAMES = ", ".join(f"`{name}`" for name in DIALECTS)


def check_dialect(name: str) -> str:
    if name not in DIALECTS:
        raise ValueError(f"there is no such dialect; choose one of {', '.join(DIALECTS)}")
    return name


DialectName = Annotated[str, AfterValidator(check_dialect)]
Urls = Annotated[list[str], NoDecode, BeforeValidator(split_commas)]


class BackendSettings(BaseModel, extra="forbid"):
    """One backend: a set of interchangeable replicas of one engine."""

    urls: Urls = Field(
        min_length=1,
        description="http://HOST:PORT of each replica, comma-separated. dns://HOST:PORT stands for one replica at each"
        " address of the name, srv://NAME for one at each SRV record; both are looked up every 2 s.",
    )
    dialect: DialectName = Field(description=f"What the servers speak. One of {DIALECT_NAMES}.")
    device_class: DeviceClass = Field(description="gpu is preferred for long requests; cpu is the fallback.")
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Public model name → the name this backend serves it under. Empty: the names it lists itself.",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="Requests one replica runs at once. Unset: what it reports or shows, else the dialect's default.",
    )
    context: int | None = Field(
        None,
        ge=1,
        description="Context length in tokens. Unset: what the replica reports. llama-cpp-python reports none: set this"
        " to its --n_ctx, and counting a chat's tokens leaves its cache alone.",
    )
    api_key: Annotated[SecretStr | None, BeforeValidator(read_backend_key)] = Field(
        None, description="Sent to the backend as a bearer token. `none` takes away one that was set."
    )
    chat_template: Path | None = Field(
        None,
        description="llama-cpp-python only: a tokenizer_config.json with the model's chat_template, with which this"
        " backend can resume a chat whose stream broke elsewhere; `make run` sets it.",
    )
    tools: bool | None = Field(
        None, description="Whether it can call tools. Unset: what the dialect or the replica says."
    )
    images: bool | None = Field(
        None, description="Whether it can read images. Unset: what the replica says, else the dialect."
    )
    embeddings: bool | None = Field(
        None, description="Whether it can compute embeddings. Unset: what the dialect or the replica says."
    )
    connect_timeout_s: float = Field(2.0, gt=0, description="To open a connection. Backends are close, so 2 s is long.")
    first_byte_timeout_s: float = Field(
        60.0, gt=0, description="From sending a short request to its first output. Queueing in vLLM counts."
    )
    first_byte_per_1k_words_s: float = Field(
        60.0,
        ge=0,
        description="Added for each 1,000 words of prompt, or 1,300 tokens: a CPU prefills some 100 tokens a second.",
    )
    idle_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Longest silence between two chunks of a stream; ten times as long with tools or a schema, whose"
        " parsers hold text back.",
    )
    total_timeout_s: float = Field(3600.0, gt=0, description="Longest life of one attempt.")

    @field_validator("urls")
    @classmethod
    def _urls(cls, urls: list[str]) -> list[str]:
        urls = [check_url(url) for url in urls]
        if len(set(urls)) < len(urls):
            raise ValueError("the same URL is listed twice")
        return urls

    @field_validator("chat_template")
    @classmethod
    def _template_that_works(cls, path: Path | None) -> Path | None:
        if path is not None:
            load_template(path)
        return path

    @model_validator(mode="after")
    def _capabilities_that_work(self) -> BackendSettings:
        dialect = DIALECTS[self.dialect]
        for setting, reason in ((self.embeddings, dialect.why_no_embeddings), (self.images, dialect.why_no_images)):
            if setting and reason:
                raise ValueError(reason)
        return self

    @model_validator(mode="before")
    @classmethod
    def _device_class_follows_dialect(cls, values: Any) -> Any:
        if isinstance(values, dict) and "device_class" not in values:
            dialect = DIALECTS.get(str(values.get("dialect")))
            values = {**values, "device_class": dialect.device_class if dialect else "cpu"}
        return values


class Routing(BaseModel, extra="forbid"):
    """Thresholds of the default policy (routing/policy.py)."""

    long_prompt_words: int = Field(100, ge=0, description="Rule 2: a prompt of more words goes to the GPU.")
    long_max_tokens: int = Field(1024, ge=0, description="Rule 2: a larger max_tokens goes to the GPU.")
    max_tokens_believed_below: int = Field(
        8192,
        ge=1,
        description="A max_tokens of this or more is a client's constant and says nothing about the answer's length:"
        " Claude Code and opencode send 32000 with every request, Zed 65535. Rule 2 ignores it.",
    )
    urgent_load: float = Field(0.7, gt=0, description="Rule 3: urgent work takes the GPU below this load.")
    load_limit: float = Field(1.0, gt=0, description="Rule 6: at or over this load short work spills to the CPU.")
    waiting_full: float = Field(5.0, gt=0, description="Rule 5: this many waiting requests are load 1.")
    kv_full: float = Field(0.8, gt=0, le=1, description="Rule 5: this share of KV cache used is load 1.")
    continuation: bool = Field(
        True, description="Resume a broken stream on another replica. A client opts out with `X-Continuation: none`."
    )
    hold_constrained: bool = Field(
        False,
        description="Hold a streamed answer with a JSON schema or grammar until it is complete, so that any replica can"
        " give it anew. Off: it streams, and another replica must be able to go on in its middle.",
    )
    max_attempts: int = Field(4, ge=1, description="Maximum number of candidates in a plan, and so of attempts.")


class Settings(BaseSettings):
    """All settings of a proxy. Each is checked when it is loaded; `description` is what docs/configuration.md shows."""

    model_config = SettingsConfigDict(
        env_prefix="XGEN_",
        env_nested_delimiter="__",
        env_file=".env",
        dotenv_filtering="only_existing",  # other programs share .env; loading.py reports typos in XGEN_… names
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. All but loopback addresses need `api_keys`, or its word `none`.",
    )
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    backends: dict[str, BackendSettings] = Field(
        default_factory=dict,
        description="The backends by name. `vllm` and `llama_cpp` need only urls: their dialect is known.",
    )
    default_model: str | None = Field(None, description="For requests that name no model. Unset: the first known.")
    api_keys: Annotated[list[str] | Literal["none"] | None, NoDecode, BeforeValidator(read_key_hashes)] = Field(
        None,
        description="SHA-256 (hex) of each key a client may use; `xgen-proxy key` makes one. `none`: no key is asked"
        " for. Unset: the same, but only on a loopback address.",
    )
    strip_attribution: bool = Field(
        True,
        description="Leave the attribution block out of Claude Code's system prompts: it changes with every request,"
        " so that no engine finds the rest of the prompt in its prefix cache.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = Field(
        default=(),
        description="IP networks, comma-separated, whose X-Forwarded-For is trusted when the log names the client.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = Field(
        default=(),
        description="Origins, comma-separated, whose web pages may call the API, such as https://chat.example.org; `*`"
        " for all. Empty: none may.",
    )
    models: Models = Models()
    routing: Routing = Routing()
    fallback: Fallback = Fallback()
    limits: Limits = Limits()
    memory_guard: MemoryGuard = MemoryGuard()
    scrape_interval_s: float = Field(1.0, gt=0, description="Between two scrapes of a replica's load, with jitter.")
    scrape_timeout_s: float = Field(2.0, gt=0, description="A busy vLLM takes up to 0.35 s to answer a scrape.")
    stale_after_s: float = Field(5.0, gt=0, description="A load older than this counts as full.")
    canary_interval_s: float = Field(
        30.0,
        ge=0,
        description="A vLLM that has sent nothing for this long gets a request for one token, since a hung engine still"
        " passes health checks. 0: never.",
    )
    sse_keepalive_s: float = Field(
        0.0,
        ge=0,
        description="A stream that has sent nothing for this long, at most twice as long, sends a comment, since some"
        " load balancers cut a connection after 60 s of silence. The first one sends status 200. 0: never.",
    )
    drain_s: float = Field(30.0, ge=0, description="How long live requests may take to finish after SIGTERM.")
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector for traces, such as http://HOST:4318. Unset: no traces. Needs the extra"
        " otel.",
    )
    log_format: Literal["auto", "json", "plain"] = Field("auto", description="auto: plain on a terminal, else JSON.")

    @model_validator(mode="before")
    @classmethod
    def _known_backends(cls, values: Any) -> Any:
        """The names `vllm` and `llama_cpp` imply their dialect."""
        known = {"vllm": "vllm", "llama_cpp": "llama-cpp-python"}
        backends = values.get("backends") if isinstance(values, dict) else None
        if isinstance(backends, dict):
            for name, backend in backends.items():
                if name in known and isinstance(backend, dict):
                    backend.setdefault("dialect", known[name])
        return values

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(network)) for network in networks)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
                raise ValueError(
                    f"{origin!r} is not an origin; write https://HOST, http://HOST:PORT or *, without a path"
                )
        return origins

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, url: str | None) -> str | None:
        if not url:
            return None
        if not url.startswith(("http://", "https://")):
            raise ValueError("write http://HOST:4318, where an OpenTelemetry collector takes OTLP over HTTP")
        if find_spec("opentelemetry.exporter") is None:
            raise ValueError("traces need the extra: pip install '.[otel]' in a checkout of xgen-proxy")
        return url

    @property
    def is_local(self) -> bool:
        """It listens where only this machine can connect. Of names, only `localhost` is known to be such."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        secrets = secrets_source(settings_cls)
        toml = TomlConfigSettingsSource(settings_cls, settings_cls.model_config.get("toml_file") or config_file())
        return init_settings, env_settings, dotenv_settings, secrets, toml


def settings_with_file(path: Path) -> type[Settings]:
    """Settings that read their TOML from `path`. pydantic-settings takes it from the class, not from an argument."""

    class SettingsWithFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    return SettingsWithFile


def config_file() -> Path:
    """The TOML file that is read without `--config`."""
    return Path(os.environ.get("XGEN_CONFIG", DEFAULT_CONFIG))


def secrets_dir() -> Path:
    return Path(os.environ.get("XGEN_SECRETS_DIR", DEFAULT_SECRETS))


def secrets_source(settings: type[BaseSettings]) -> NestedSecretsSettingsSource:
    return NestedSecretsSettingsSource(SecretsSettingsSource(settings), secrets_dir(), secrets_dir_missing="ok")
