"""A setup as lines for a POSIX shell: safe to eval, with comments that say what each line is for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from xgen_proxy.launch.clients import Client, Setup
from xgen_proxy.launch.proxy import KEY_VARIABLE, Proxy


def script(client: Client, proxy: Proxy, setup: Setup, command: str) -> str:
    """`command`: the command line that prints this."""
    return "\n".join([*_head(client, proxy, setup, command), "", *_lines(proxy, setup)]) + "\n"


def _head(client: Client, proxy: Proxy, setup: Setup, command: str) -> Iterator[str]:
    context = f" ({proxy.model.context:,} tokens)" if proxy.model.context else ""
    yield f"# {client.title} with the proxy at {proxy.url} and the model {proxy.model.id}{context}."
    yield f'#   in this shell:  eval "$({command})" && {shlex.join(setup.command)}'
    yield f"#   at once:        {command} --run"
    yield f"#   to keep:        {command} --config, for {setup.keep}"
    for note in setup.notes:
        yield f"# {note}"


def _lines(proxy: Proxy, setup: Setup) -> Iterator[str]:
    for each in setup.variables:
        yield f"# {each.why}"
        yield f"unset {each.name}" if each.value is None else f"export {each.name}={_value(each.value, proxy)}"
    if setup.flags:
        yield f'{setup.command[0]}() {{ command {shlex.join([*setup.command, *setup.flags])} "$@"; }}'


def _value(value: str, proxy: Proxy) -> str:
    """A key that the shell has already is not shown."""
    return f'"${KEY_VARIABLE}"' if proxy.key_is_set and value == proxy.key else shlex.quote(value)
