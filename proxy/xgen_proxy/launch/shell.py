"""A setup as lines for a POSIX shell: safe to eval, with comments that say what each line is for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from xgen_proxy.launch.clients import Client, Setup
from xgen_proxy.launch.target import KEY_VARIABLE, Target


def script(client: Client, target: Target, setup: Setup, command: str) -> str:
    """`command`: the command line that prints this."""
    return "\n".join([*_head(client, target, setup, command), "", *_lines(target, setup)]) + "\n"


def _head(client: Client, target: Target, setup: Setup, command: str) -> Iterator[str]:
    context = f" ({target.model.context:,} tokens)" if target.model.context else ""
    yield f"# {client.title} with the proxy at {target.url} and the model {target.model.id}{context}."
    yield f'#   in this shell:  eval "$({command})" && {shlex.join(setup.command)}'
    yield f"#   at once:        {command} --run"
    yield f"#   to keep:        {command} --config, for {setup.keep}"
    for hint in setup.hints:
        yield f"# {hint}"


def _lines(target: Target, setup: Setup) -> Iterator[str]:
    for each in setup.variables:
        yield f"# {each.why}"
        yield f"unset {each.name}" if each.value is None else f"export {each.name}={_value(each.value, target)}"
    if setup.flags:
        yield f'{setup.command[0]}() {{ command {shlex.join([*setup.command, *setup.flags])} "$@"; }}'


def _value(value: str, target: Target) -> str:
    """A key that the shell has already is not shown."""
    return f'"${KEY_VARIABLE}"' if target.key_is_set and value == target.key else shlex.quote(value)
