"""The texts that models are measured on, and the prompts that they answer: shipped, or the user's file."""

from __future__ import annotations

from pathlib import Path

from xgen_proxy.models.errors import ModelError
from xgen_proxy.values import frozen

SHIPPED = Path(__file__).resolve().parent / "texts"
LANGUAGES = ("english", "korean", "code")


@frozen
class Prompt:
    language: str
    text: str


def texts(own: Path | None) -> dict[str, str]:
    """By name. Raises ModelError if the user's file cannot be read."""
    if own is None:
        return {language: (SHIPPED / f"{language}.txt").read_text("utf-8") for language in LANGUAGES}
    try:
        return {str(own.resolve()) if own.name == "all" else own.name: own.read_text("utf-8")}
    except OSError as error:
        raise ModelError(f"cannot read {own}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelError(f"{own} is not text in UTF-8") from None


def prompts(count: int) -> list[Prompt]:
    """`count` of them, the languages in the same proportion as in all. Raises ModelError if there are fewer."""
    lines = (SHIPPED / "prompts.txt").read_text("utf-8").splitlines()
    found = [Prompt(*line.split("\t")) for line in lines]
    if count > len(found):
        raise ModelError(f"--answers {count}: there are {len(found)} prompts")
    return [found[place * len(found) // count] for place in range(count)]


def windows(name: str, tokens: list[int], size: int, most: int | None) -> list[list[int]]:
    """The tokens cut into windows; what is left over is not used. Raises ModelError if there is not one."""
    found = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not found:
        raise ModelError(
            f"the text {name} has {len(tokens)} tokens and a window needs {size}; use a longer text or a "
            "smaller --context"
        )
    return found[:most]
