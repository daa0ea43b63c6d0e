"""What is asked of which process, with processes that are made up. tests/e2e/test_compare.py has real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xgen_proxy.gguf.header import GgufFile, Tensor
from xgen_proxy.models.compare import comparison
from xgen_proxy.models.compare.plan import Plan
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.inspection.machine import Place

BASE, SMALL = Path("m-f16.gguf"), Path("m-q4.gguf")


class FakeWorker:
    """A model that says what the name of its file makes likely."""

    asked: list[tuple[str, str]]
    vocabularies: dict[str, str]
    open = 0

    def __init__(self, model: Path, log: Path) -> None:
        self.model = model

    def __enter__(self) -> FakeWorker:
        FakeWorker.open += 1
        return self

    def __exit__(self, *exception: object) -> None:
        FakeWorker.open -= 1

    def ask(self, command: str, **arguments: Any) -> Any:
        FakeWorker.asked.append((self.model.stem, command))
        is_base = self.model == BASE
        match command:
            case "load":
                return {"load_s": 0.5 if arguments["mmap"] else 0.7, "empty_bytes": 10}
            case "vocabulary":
                return self.vocabularies.get(self.model.name, "same")
            case "tokenize":
                return list(range(100)) if self.vocabularies.get("tokens") != self.model.name else [1]
            case "window":
                return {"losses": [1.0, 2.0], "divergences": [0.0 if is_base else 0.1] * 2, "same_top": [True, is_base]}
            case "speed":
                number = FakeWorker.asked.count((self.model.stem, command))  # 1, the first time
                return {"prompt": 100.0 * number, "generation": 10.0 * number}
            case "answer":
                return [1, 2] if is_base or "France" in arguments["prompt"] else [1, 3]
        return 1000


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWorker.asked, FakeWorker.vocabularies, FakeWorker.open = [], {}, 0
    tensor = Tensor("w", "F16", (100,), 200, 200)
    monkeypatch.setattr(comparison, "Worker", FakeWorker)
    monkeypatch.setattr(
        comparison, "read_model", lambda path: GgufFile(path, 200 if path == BASE else 90, {}, (tensor,))
    )


def plan(**changes: Any) -> Plan:
    return replace(Plan((SMALL, BASE), BASE, threads=1, context=32, repeat=2, answers=4), **changes)


def test_figures_by_model_and_text() -> None:
    found = comparison.compare(plan())
    base, small = found["models"]
    assert (found["base"], base["name"], small["name"]) == ("f16", "f16", "q4")  # the largest first
    assert found["texts"] == {"english": 3, "korean": 3, "code": 3}
    assert list(small["texts"]) == ["english", "korean", "code", "all"]
    assert small["texts"]["all"]["tokens"] == 18
    assert small["texts"]["all"]["kld"] == pytest.approx(0.1)
    assert small["texts"]["korean"]["same_top"] == 0.5
    assert base["texts"]["all"]["same_top"] == 1
    assert small["load_s_no_mmap"]["values"] == [0.7, 0.7]
    assert small["rss_bytes_mmap"]["median"] == 1000
    assert small["answers"]["all"]["of"] == 4
    assert small["answers"]["all"]["same"] == 1
    assert base["answers"]["all"]["same"] == 4
    assert FakeWorker.open == 0


def test_the_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "ram", lambda: Place("RAM (limit of the container)", 10**9, 5 * 10**8))
    with pytest.raises(ModelError, match=r"need 0\.6 GB of memory together and 0\.5 GB are free"):
        comparison.compare(plan())


def test_models_take_turns() -> None:
    comparison.compare(plan())
    speeds = [model for model, command in FakeWorker.asked if command == "speed"]
    assert speeds[:6] == ["m-f16", "m-q4"] * 3  # a round to warm up, and two
    loads = [model for model, command in FakeWorker.asked if command == "load"]
    assert loads == ["m-f16", "m-q4", *["m-f16", "m-f16", "m-q4", "m-q4"] * 2]


def test_the_speed_of_the_round_that_warms_up_does_not_count() -> None:
    for model in comparison.compare(plan())["models"]:
        assert model["prompt_tokens_per_s"]["values"] == [200.0, 300.0], model["name"]
        assert model["generated_tokens_per_s"]["values"] == [20.0, 30.0], model["name"]


def test_nothing_is_answered_where_nothing_is_asked() -> None:
    assert comparison.compare(plan(answers=0))["models"][0]["answers"] == {}


def test_another_vocabulary_is_refused() -> None:
    FakeWorker.vocabularies = {SMALL.name: "other"}
    with pytest.raises(ModelError, match=r"m-q4\.gguf has another vocabulary than the base m-f16\.gguf"):
        comparison.compare(plan())
    assert FakeWorker.open == 0


def test_another_tokenizer_is_refused() -> None:
    FakeWorker.vocabularies = {"tokens": SMALL.name}
    with pytest.raises(ModelError, match=r"m-q4\.gguf cuts the text english into other tokens"):
        comparison.compare(plan())


def test_windows_can_be_limited() -> None:
    assert comparison.compare(plan(windows=1))["texts"] == {"english": 1, "korean": 1, "code": 1}
