"""The process's side of the conversation, with the default model."""

from __future__ import annotations

from pathlib import Path

import pytest

from xgen_proxy.models.compare.worker import Commands, reply


@pytest.fixture(scope="module")
def commands(gguf: str) -> Commands:
    found = Commands()
    loaded = found.load(gguf, 256, 1, mmap=True)
    assert loaded["load_s"] > 0
    assert loaded["empty_bytes"] < found.memory()
    return found


def test_a_model_does_not_differ_from_itself(commands: Commands, tmp_path: Path) -> None:
    tokens = commands.tokenize("The ferry to the island leaves at twenty past seven, and it does not wait. " * 2)[:32]
    logits = str(tmp_path / "logits.npy")
    commands.write_window(tokens, logits)
    assert Path(logits).stat().st_size > 15 * commands.vocabulary_size() * 4
    found = commands.window(tokens, logits)
    assert found["divergences"] == [0.0] * 15
    assert found["same_top"] == [True] * 15
    assert min(found["losses"]) >= 0


def test_a_fingerprint_of_the_vocabulary(commands: Commands) -> None:
    assert len(commands.vocabulary()) == 64
    assert commands.vocabulary_size() == 49152


def test_speed_and_answers(commands: Commands) -> None:
    found = commands.speed(commands.tokenize("one two three"), 2)
    assert found["prompt"] > 0
    assert found["generation"] > 0
    assert commands.answer("What is the capital of France?", 4) == commands.answer("What is the capital of France?", 4)


def test_a_reply_is_a_value_or_an_error() -> None:
    assert "value" in reply(Commands(), {"command": "memory", "arguments": {}})
    assert reply(Commands(), {"command": "vocabulary", "arguments": {}}) == {"error": "no model was loaded"}
