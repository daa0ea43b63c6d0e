"""`xgen-proxy cost` as its user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import status_of
from tests.support.documents import ROOT
from tests.unit.costs.results import vllm_result
from xgen_proxy import cli

Cost = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def cost(capsys: pytest.CaptureFixture[str]) -> Cost:
    def cost(*arguments: str) -> tuple[int, str, str]:
        return status_of("cost", *arguments), *capsys.readouterr()

    return cost


@pytest.fixture
def files(cost: Cost) -> list[str]:
    """The arguments that name prices and measurements: two repeats on the GPU, one run on the CPU."""
    assert cost("--write-prices", "prices.toml")[0] == 0
    for name, goodput in {"gpu-1": 30.0, "gpu-2": 31.0, "cpu": 0.9}.items():
        save(f"{name}.json", vllm_result(goodput, throughput=goodput * 1.2, rate=64.0 if goodput > 1 else 2.0))
    return ["--prices", "prices.toml", "gpu=gpu-1.json", "gpu=gpu-2.json", "cpu=cpu.json"]


def save(name: str, content: Any) -> None:
    Path(name).write_text(json.dumps(content))


def test_the_way_of_the_help(files: list[str], directory: Path) -> None:
    """The real command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "xgen_proxy.cli", "cost", *files, "--plot", "cost.svg", "--json", "cost.json"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT / "proxy")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Break-even: gpu costs less than cpu above " in done.stdout
    assert "note:" not in done.stdout
    found = json.loads((directory / "cost.json").read_text())
    assert found["conditions"]["command"].startswith("xgen-proxy cost --prices prices.toml gpu=gpu-1.json")
    assert [each["file"] for each in found["measured"]] == ["gpu-1.json", "gpu-2.json", "cpu.json"]
    shown = found["break_even"][0]["requests_per_s"]["middle"]
    assert f"{shown:.1f}" in done.stdout
    assert f"break-even {shown:.1f}" in (directory / "cost.svg").read_text()


def test_the_key_is_not_written(cost: Cost, files: list[str]) -> None:
    assert cost(*files, "--api-key", "hush", "--json", "cost.json")[0] == 0
    written = Path("cost.json").read_text()
    assert "hush" not in written
    assert "gpu=gpu-1.json" in json.loads(written)["conditions"]["command"]


def test_results_are_renamed_to_their_place(cost: Cost, files: list[str]) -> None:
    for name in ("cost.json", "cost.svg"):
        Path(name).write_text("old")
        os.link(name, f"old-{name}")
    assert cost(*files, "--json", "cost.json", "--plot", "cost.svg")[0] == 0
    assert [Path(f"old-{name}").read_text() for name in ("cost.json", "cost.svg")] == ["old", "old"]


def test_help_teaches(cost: Cost) -> None:
    status, out, _ = cost("--help")
    assert status == 0
    for words in ("--write-prices prices.toml", "vllm bench serve", "--goodput ttft:500 tpot:50", "--plot cost.svg"):
        assert words in out


def test_help_says_which_goodput_counts(cost: Cost) -> None:
    words = " ".join(cost("--help")[1].split())
    assert "a closed loop (--max-concurrency alone) has none, and counts only where a subject has nothing else" in words
    assert "compared as they were measured through the proxy if all were" in words


def test_the_examples_of_the_help_can_be_typed(cost: Cost) -> None:
    _, out, _ = cost("--help")
    commands = re.findall(r"^ +(xgen-proxy cost .*)$", out, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        cli.parser().parse_args(command.split()[1:])


def test_one_machine_has_a_cost_but_no_break_even(cost: Cost, files: list[str]) -> None:
    status, out, _ = cost(*files[:4])
    assert status == 0
    assert "reak-even" not in out
    assert cost(*files[:4], "--plot", "cost.svg")[2] == (
        "xgen-proxy: a plot compares machines: name measurements of two or more\n"
    )


def test_runs_without_goodput(cost: Cost, files: list[str]) -> None:
    save("late.json", [vllm_result(None, throughput=5.0, rate=8.0), vllm_result(4.0, rate=8.0)])
    assert (
        "note: runs without goodput that were left out: 1; --any-latency counts them too."
        in cost(*files, "cpu=late.json")[1]
    )
    assert "note: every completed request counts here, however late it was." in cost(*files, "--any-latency")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --prices FILE; `xgen-proxy cost --write-prices prices.toml` writes one to edit"),
        (
            ["--prices", "none.toml", "gpu=gpu-1.json"],
            "there is no none.toml; `xgen-proxy cost --write-prices none.toml`",
        ),
        (["--prices", "prices.toml"], "needs either files of measurements or --url of a running proxy"),
        (["--prices", "prices.toml", "gpu=a.json", "--url", "http://x"], "needs either files of measurements or --url"),
        (["--prices", "prices.toml", "gpu=none.json"], "cannot read none.json: No such file or directory"),
        (
            ["--prices", "prices.toml", "tpu=cpu.json"],
            "the prices have no machine named tpu, only gpu, cpu; add a table",
        ),
        (["--prices", "prices.toml", "gpu=slow.json"], "slow.json has no goodput: measure with `vllm bench serve"),
        (
            ["--prices", "prices.toml", "cpu=cpu.json", "--json", "none/a.json"],
            "cannot write none/a.json: No such file",
        ),
        (["--prices", "prices.toml", "--url", "http://127.0.0.1:1"], "no proxy answers at http://127.0.0.1:1"),
        (["--prices", "prices.toml", "--url", "http://127.0.0.1:1", "--for", "0"], "--for needs more than 0 seconds"),
        (["--prices", "prices.toml", "--url", "http://x", "--plot", "a.svg"], "--plot and --json are for files of"),
        (["--write-prices", "prices.toml"], "prices.toml exists already and is not overwritten"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    cost: Cost, files: list[str], arguments: list[str], message: str
) -> None:
    save("slow.json", vllm_result(None, throughput=5.0))
    status, out, err = cost(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"xgen-proxy: {message}")
    assert err.count("\n") == 1


def test_serving_imports_nothing_of_it() -> None:
    script = "import sys, xgen_proxy.cli; print([name for name in sys.modules if name.startswith('xgen_proxy.costs.')])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "proxy")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['xgen_proxy.costs.commands']\n"
