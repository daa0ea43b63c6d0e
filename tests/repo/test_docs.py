"""What the documents say is what the code does: in both directions, wherever a list can be compared."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route

from backends import both, local
from tests.support import documents
from tests.support.documents import PAGES, README, ROOT, commands, inline, name, table_rows, ticked
from xgen_proxy import cli, errors
from xgen_proxy.api.generate import GenerateRequest
from xgen_proxy.api.ops import Local, backend_status
from xgen_proxy.app import create_app
from xgen_proxy.config.loading import NOT_SETTINGS, ConfigSources, env_name
from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ModelFacts
from xgen_proxy.errors import BadGatewayError, ProxyError, RequestRejectedError
from xgen_proxy.fleet import admission, circuit_breaker, health
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.details.gpus import Gpu
from xgen_proxy.fleet.details.kv_cache import KvCache
from xgen_proxy.fleet.memory import pressure
from xgen_proxy.fleet.memory.process import Memory
from xgen_proxy.forwarding import retry_budget
from xgen_proxy.request.features import HINTS

DOCS = ROOT / "docs"
PACKAGE = ROOT / "proxy" / "xgen_proxy"
API, METRICS, ARCHITECTURE = DOCS / "api.md", DOCS / "metrics.md", DOCS / "architecture.md"
OPERATIONS = DOCS / "operations.md"
ROUTING, CONFIGURATION = DOCS / "routing.md", DOCS / "configuration.md"
NGINX_PAGE = ROOT / "nginx" / "README.md"
LLAMA_CPP = {"llama_cpp": {"urls": ["http://127.0.0.1:1"]}}
ids = pytest.mark.parametrize("page", PAGES, ids=name)


def source(*files: str) -> str:
    """The proxy's code: the files named, or all of it."""
    paths = [PACKAGE / file for file in files] or sorted(PACKAGE.rglob("*.py"))
    return "\n".join(path.read_text() for path in paths)


# The pages themselves


@ids
def test_tables_are_what_the_code_says(page: Path) -> None:
    rendered = runpy.run_path(str(DOCS / "tables.py"))["rendered"]
    text = page.read_text()
    assert rendered(text) == text, f"{name(page)} is stale: run python docs/tables.py"


@ids
def test_links_lead_somewhere(page: Path) -> None:
    for link in documents.LINK.findall(documents.prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target), link


@ids
def test_code_blocks_are_of_a_kind_that_is_tested(page: Path) -> None:
    kinds = {kind for kind, _ in documents.BLOCK.findall(page.read_text())}
    assert kinds <= {"sh", "python", "toml", "nginx", "http"}
    assert "http" not in kinds or page == README, "a response is shown in the README only"
    assert "python" not in kinds or page == README, "python is run from the README only"
    assert "nginx" not in kinds or page == NGINX_PAGE, "nginx runs what its own page says"


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=name)
def test_pictures_are_used_and_stand_alone(picture: Path) -> None:
    text = picture.read_text()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text or "matplotlib" in text  # a plot brings its own white page
    assert not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)|<script", text), "it loads something"
    assert any(picture.name in page.read_text() for page in PAGES)


# Commands


@ids
def test_every_command_can_be_run(page: Path) -> None:
    for command in commands(page):
        for part in command.split(" | "):
            check_command(part)


def check_command(command: str) -> None:
    first, *rest = documents.words(command)
    assert first in CHECKS, f"no test knows how to check: {command}"
    CHECKS[first](rest)


def check_variable(assignment: str) -> None:
    variable, _, value = assignment.partition("=")
    if variable.startswith("XGEN_TEST_"):
        assert variable in source_of_tests(), variable
        return
    assert variable.startswith("XGEN_"), variable
    setting = variable.removeprefix("XGEN_").lower().replace("__", ".")
    assert env_name(setting) == variable
    assert setting in known_settings(), variable
    assert value


def source_of_tests() -> str:
    return "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))


def known_settings() -> set[str]:
    fleet_of_both = {each: {"urls": ["http://127.0.0.1:1"]} for each in ("vllm", "llama_cpp")}
    return {setting for setting, _, _ in ConfigSources().explain(Settings(backends=fleet_of_both))}


def check_make(words: list[str]) -> None:
    """The targets are there; of `make run`, make itself says what it would start, and that takes these flags."""
    makefile = (ROOT / "Makefile").read_text()
    values = [word for word in words if "=" in word]
    for target in set(words) - set(values):
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), f"make help does not list {target}"
    programs = {
        "run": local.parse,
        "both": both.parse,
    }  # a line with $(MAKE) in it, as `test` has, runs in spite of -n
    if found := programs.keys() & set(words):
        plan = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        started = re.search(r"-m backends\.(?:local|both) (.*)", plan.stdout.replace("\\\n", ""))
        assert started, plan.stdout
        programs[found.pop()](documents.words(started[1]))
        for word in values:
            assert word.partition("=")[2] in plan.stdout, f"{word} changes nothing"
    else:
        assert not values, f"no test knows these variables: {words}"


def check_xgen_proxy(words: list[str]) -> None:
    cli.parser().parse_args(words)


def check_python(words: list[str]) -> None:
    """`-m pytest PATH`, `-m MODULE` or a file."""
    module, *rest = words[1:] if words[0] == "-m" else ["", *words]
    if module and module != "pytest":
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for argument in rest if module in ("", "pytest") else []:
        assert (ROOT / argument).exists(), argument


def check_pip(words: list[str]) -> None:
    """`install .`, which installs the package of this checkout, or with one of its extras: `.[models]`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install", words
    assert words[1:] in ([["."]] + [[f".[{extra}]"] for extra in extras]), words


def check_curl(words: list[str]) -> None:
    """Run for real by tests/e2e/test_readme.py."""
    assert words[0].startswith("http://127.0.0.1:8080/"), words
    path = words[0].removeprefix("http://127.0.0.1:8080")
    assert path in {route for _, route in served_routes()}, path


def check_docker(words: list[str]) -> None:
    """The services that are named exist. tests/e2e/test_compose.py runs such commands."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for word in words:
        scaled = re.fullmatch(r"([a-z-]+)=\d", word)
        container = re.fullmatch(r"xgen-([a-z-]+)-\d", word)
        named = scaled or container
        assert not named or named[1] in services, word
    if words[:1] == ["compose"]:
        assert words[1] in ("up", "build", "ps", "exec", "logs", "cp"), words
        if words[1] == "cp":
            service, _, path = words[2].partition(":")
            assert any(volume.split(":")[-2] in path for volume in services[service]["volumes"]), words


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "xgen-proxy": check_xgen_proxy,
    ".venv/bin/python": check_python,
    "curl": check_curl,
    "pip": check_pip,
    "docker": check_docker,
    "echo": lambda words: None,
    "export": lambda words: check_variable(words[0]),
}


@ids
def test_commands_in_the_text_exist(page: Path) -> None:
    for text in inline(page):
        first = text.split()[0]
        if first in ("make", "xgen-proxy") and len(text.split()) > 1:
            check_command(text)
        elif text.startswith("python "):
            check_python(text.split()[1:])


def test_make_help_tells_every_target_a_person_uses() -> None:
    documented = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^  run +serve", documented, re.MULTILINE)
    assert re.search(r"^  test +all tests", documented, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert f"  {target}" in documented or target.startswith("python-"), f"make help does not list {target}"


def test_the_readmes_curl_is_the_one_that_make_run_prints(capsys: pytest.CaptureFixture[str]) -> None:
    local.welcome("http://127.0.0.1:8080", "smollm2", ROOT / "run")
    printed = capsys.readouterr().err
    [curl] = [block for block in documents.blocks(README, "sh") if block.startswith("curl")]
    assert flat(curl) in flat(printed)


def flat(text: str) -> str:
    return " ".join(text.split())


# The walk of one request


def walk() -> list[str]:
    """The name that each step of the walk in docs/architecture.md begins with."""
    section = ARCHITECTURE.read_text().partition("\n### The walk\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


def test_the_walk_goes_from_the_app_to_the_observer() -> None:
    assert walk()[0] == "app.ProxyApp.__call__"
    assert walk()[-1] == "forwarding.outcome.Observer.request_finished"


@pytest.mark.parametrize("step", walk())
def test_every_name_in_the_walk_exists(step: str) -> None:
    """`module.Class.method`, `module.Class` or `module.function`; modules are in lower case."""
    found = re.fullmatch(r"([a-z_.]+)\.([A-Z][\w.]*|[a-z_]+)", step)
    assert found, step
    attrgetter(found[2])(import_module(f"xgen_proxy.{found[1]}"))


# Settings


@ids
def test_settings_in_the_text_exist(page: Path) -> None:
    known = known_settings() | {setting.replace(".vllm.", ".NAME.") for setting in known_settings()}
    known |= {"backends"}
    for text in inline(page):
        if re.fullmatch(r"(routing|limits|backends)\.[\w.]+", text) and not text.endswith((".py", ".in")):
            assert text in known or text in walk(), text
        if re.fullmatch(r"XGEN_[A-Z0-9_]+", text) and text not in NOT_SETTINGS:
            setting = text.removeprefix("XGEN_").lower().replace("__", ".").replace(".name.", ".NAME.")
            assert setting in known, text


def test_the_example_file_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = documents.blocks(CONFIGURATION, "toml")
    file = tmp_path / "xgen-proxy.toml"
    file.write_text(example)
    monkeypatch.setenv("XGEN_CONFIG", str(file))
    settings = ConfigSources().load()
    assert settings.default_model == "chat"
    assert all("chat" in backend.models for backend in settings.backends.values())
    assert tomllib.loads(example).keys() == {"default_model", "backends", "routing"}


def test_every_flag_of_serve_is_told_by_its_help() -> None:
    assert "flags of `xgen-proxy serve`" in CONFIGURATION.read_text()
    for page in PAGES:
        for flag in re.findall(r"xgen-proxy serve ([^`\n]*)", page.read_text()):
            cli.parser().parse_args(["serve", *documents.words(flag)])


# Routes, headers, errors


def served_routes() -> Iterator[tuple[str, str]]:
    front = create_app(Settings(backends=LLAMA_CPP))
    yield from (("POST", path) for path in front.inference_routes)
    for route in front.app.routes:
        assert isinstance(route, Route)
        method = "POST" if "POST" in (route.methods or ()) else "GET"
        yield method, route.path.replace(":path", "")


def test_routes() -> None:
    documented = [tuple(ticked(row[0])[0].split()) for row in table_rows(API, "route")]
    assert sorted(documented) == sorted(served_routes()), "docs/api.md has other routes than the app"


def test_request_headers() -> None:
    documented = {header.lower() for row in table_rows(API, "request header") for header in ticked(row[0])}
    hints = {f"x-{hint.replace('_', '-')}" for hint in HINTS}
    read = set(re.findall(r'(?:headers\.get\(|if name == )b"([\w-]+)"', source()))
    assert documented == (read | hints) - {"content-length"}, "docs/api.md has other headers than are read"


def test_answer_headers() -> None:
    documented = {header.lower() for row in table_rows(API, "answer header") for header in ticked(row[0])}
    files = (
        "forwarding/progress.py",
        "fleet/replica.py",
        "downstream/response_writer.py",
        "errors.py",
        "downstream/request_body.py",
        "downstream/cors.py",
        "api/inference.py",
        "translation/writer.py",
    )
    sent = set(re.findall(r'(?<!get)\(b"([a-z-]+)", ', source(*files))) - {
        "content-type",
        "content-length",
        "connection",
    }
    assert documented == sent, "docs/api.md has other answer headers than the code"


def test_the_readmes_response_has_headers_that_are_sent() -> None:
    [response] = documents.blocks(README, "http")
    head = response.partition("\n\n")[0].splitlines()[1:]
    documented = {header.lower() for row in table_rows(API, "answer header") for header in ticked(row[0])}
    assert head
    assert {line.partition(":")[0] for line in head} <= documented


def error_classes(base: type[ProxyError] = ProxyError) -> Iterator[type[ProxyError]]:
    for each in base.__subclasses__():
        yield each
        yield from error_classes(each)


def test_errors() -> None:
    documented = {
        (status, *ticked(row[1]), ticked(row[2])[0] if ticked(row[2]) else None)
        for row in table_rows(API, "status")
        for status in row[0].split(", ")
    }
    raised = {(str(each.status), each.type, each.code) for each in error_classes() if each is not RequestRejectedError}
    raised.add(("504", BadGatewayError.type, BadGatewayError.code))
    raised.add(("502", BadGatewayError.type, "bad_answer"))
    raised.add(("503", errors.ServiceUnavailableError.type, "all_backends_failed"))
    raised.add(("400", errors.BadRequestError.type, "context_length_exceeded"))
    assert documented == raised, "docs/api.md has other errors than errors.py"


def test_every_code_in_the_source_is_told() -> None:
    text = API.read_text()
    for code in set(re.findall(r'\bcode="(\w+)"', source())) | set(re.findall(r'^    code = "(\w+)"', source(), re.M)):
        assert f"`{code}`" in text, f"docs/api.md does not list the error code {code}"


def test_hints() -> None:
    rows = table_rows(ROUTING, "field")
    assert [ticked(row[0])[0] for row in rows] == list(HINTS)
    assert [ticked(row[1])[0].lower() for row in rows] == [f"x-{hint.replace('_', '-')}" for hint in HINTS]
    [in_readme] = re.findall(r"as fields of the body or as headers: (.*?)\.", README.read_text(), re.DOTALL)
    assert ticked(in_readme) == list(HINTS)


def test_reasons() -> None:
    documented = {word for row in table_rows(ROUTING, "word") for word in ticked(row[0])}
    policy = source("routing/policy.py")
    used = set(re.findall(r'f?"(\w+): ', policy)) | set(re.findall(r'"(\w+)" if urgent else "(\w+)"', policy)[0])
    used |= {f"{word}_spill" for word in ("urgent", "default") if "{word}_spill: " in policy}
    assert documented == used, "docs/routing.md has other reasons than routing/policy.py"


def test_generate_fields() -> None:
    section = API.read_text().partition("## /generate")[2].partition("\n```")[0]
    assert set(ticked(section)) - {"auto"} == set(GenerateRequest.model_fields)


def test_fields_of_the_fleet() -> None:
    backend = Fleet(Settings(backends=LLAMA_CPP)).backends[0]
    memory = Memory(process_rss_bytes=None, model_file_bytes=None)
    local: Local = dict.fromkeys(backend.replicas, (memory, None))
    status: dict[str, Any] = backend_status(backend, backend.replicas, local)
    section = API.read_text().partition("## The fleet")[2].partition("\n## ")[0]
    documented = set(ticked(section))
    replica = status["replicas"][0]
    parts = set(replica["load"]) | set(replica["memory"])
    parts |= {field.name for kind in (KvCache, ModelFacts, Gpu) for field in fields(kind)}
    assert set(status) | set(replica) | parts <= documented
    table = {field for row in table_rows(API, "field") for field in ticked(row[0])}
    assert table == set(replica)


def test_outcomes() -> None:
    outcomes = {each.outcome for each in errors.UpstreamError.__subclasses__()}
    assert all(f"`{outcome}`" in METRICS.read_text() for outcome in outcomes)


# Numbers that the text repeats


@pytest.mark.parametrize(
    ("page", "phrase"),
    [
        (ROUTING, f"`high` counts as {admission.HEAD_START_S['high']:g} s older"),
        (ROUTING, f"gets none for {circuit_breaker.OPEN_S:g} s"),
        (ROUTING, f"up to {circuit_breaker.LONGEST_OPEN_S:g} s"),
        (ROUTING, f"step by step over {circuit_breaker.SLOW_START_S:g} s"),
        (OPERATIONS, f"{pressure.GAP:g} below its threshold, without preemptions, and after {pressure.DWELL_S:g} s"),
        (OPERATIONS, f"one request or an eighth every {pressure.GROWTH_S:g} s"),
        (OPERATIONS, f"only the last {pressure.MOST // 1024**3} count"),
        (README, f"a prompt of more than {Settings().routing.long_prompt_words} words"),
        (
            README,
            f"a `max_tokens` from {Settings().routing.long_max_tokens + 1}"
            f" to {Settings().routing.max_tokens_believed_below - 1}",
        ),
        (README, f"while its load is under {Settings().routing.urgent_load:g}"),
        (README, f"waits, at most {Settings().limits.queue_timeout_s:g} s"),
        (README, f"live answers get {Settings().drain_s:g} s"),
        (ROOT / "CONTRIBUTING.md", "95 %"),
    ],
    ids=str,
)
def test_numbers(page: Path, phrase: str) -> None:
    assert flat(phrase) in flat(page.read_text())


def test_numbers_in_words() -> None:
    threes = circuit_breaker.FAILURES, health.MISSES_BEFORE_DOWN, retry_budget.MINIMUM, pressure.READINGS
    assert set(threes) == {3}, "the pages say three"
    assert "--cov-fail-under=95" in (ROOT / "Makefile").read_text(), "CONTRIBUTING.md says 95 %"
