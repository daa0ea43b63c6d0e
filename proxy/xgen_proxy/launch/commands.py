"""The command launch: its arguments, what it prints, and how it starts the client."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from typing import Any

from xgen_proxy.launch import shell
from xgen_proxy.launch.clients import CLIENTS, Client, Setup
from xgen_proxy.launch.proxy import KEY_VARIABLE, LaunchError, LaunchUsageError, find_proxy

EXAMPLES = f"""\
examples:
  Claude Code, now:                xgen-proxy launch claude --run
  with arguments of its own:       xgen-proxy launch claude --run -- -p "What does this project do?"
  Codex, in this shell:            eval "$(xgen-proxy launch codex)" && codex
  opencode, in this project:       xgen-proxy launch opencode --config > opencode.json
  Open WebUI here, proxy there:    xgen-proxy launch openwebui --url http://proxy-box:8080 --key sk-…
  a script that asks one question: xgen-proxy launch python | python -

Without --run and --config the output is `export` lines with comments, for people and for eval. The model is chosen from
those that the proxy lists now: for agents one that can call tools, with the longest context. A key in {KEY_VARIABLE} is
used without being shown, except by --config where the client's file holds it. `xgen-proxy launch CLIENT --help` has the
flags.
"""


def add_to(commands: Any) -> None:
    """`commands`: what argparse's add_subparsers() returned."""
    help = "Print the settings of a client for this proxy, or start it with them."
    plain = argparse.RawDescriptionHelpFormatter
    launch = commands.add_parser("launch", help=help, description=help, epilog=EXAMPLES, formatter_class=plain)
    clients = launch.add_subparsers(required=True, metavar="CLIENT")
    for client in CLIENTS.values():
        what = f"{client.title}: {client.about}"
        parser = clients.add_parser(
            client.name,
            help=what,
            description=f"{what}, on the models of a running proxy.",
            epilog=f"Its program is installed by: {client.install}",
            formatter_class=plain,
        )
        parser.set_defaults(run=run, client=client)
        parser.add_argument(
            "--url", help="address of the proxy (default: from the settings in this folder, else http://127.0.0.1:8080)"
        )
        parser.add_argument("--key", "--api-key", dest="key", help=f"API key, if it requires one (or {KEY_VARIABLE})")
        parser.add_argument("--model", help="public model name (default: chosen from those of the running proxy)")
        how = parser.add_mutually_exclusive_group()
        how.add_argument("--run", dest="execute", action="store_true", help="start the client with these settings")
        how.add_argument("--config", action="store_true", help="print only the client's own configuration file")
        parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="with --run: arguments of the client")


def run(arguments: argparse.Namespace) -> int:
    try:
        launch(arguments)
    except LaunchError as error:
        sys.stderr.write(f"xgen-proxy: {error}\n")
        return error.status
    return 0


def launch(arguments: argparse.Namespace) -> None:
    """Does not return if it starts the client. Raises LaunchError."""
    client: Client = arguments.client
    if arguments.arguments and not arguments.execute:
        given = shlex.join(arguments.arguments)
        raise LaunchUsageError(f"{given!r} is for the client, which only --run starts: add --run before the --")
    proxy, note = find_proxy(arguments.url, arguments.key, arguments.model, tools=client.tools)
    setup = client.setup(proxy)
    if arguments.execute:
        check_installed(client, setup)
    if note:
        sys.stderr.write(f"xgen-proxy: note: {note}\n")
    if arguments.execute:
        sys.stderr.write(f"xgen-proxy: {client.title} with the model {proxy.model.id} at {proxy.url}\n")
        execute(setup, arguments.arguments)
    elif arguments.config or client.is_script:
        sys.stdout.write(setup.file)
    else:
        sys.stdout.write(shell.script(client, proxy, setup, command_line(arguments)))


def check_installed(client: Client, setup: Setup) -> None:
    """Raises LaunchError."""
    found = importlib.util.find_spec("openai") if client.is_script else shutil.which(setup.command[0])
    if found is None:
        raise LaunchError(f"{client.title} is not installed here; install it with: {client.install}")


def execute(setup: Setup, arguments: list[str]) -> None:
    """In place of this process, so that the client has the terminal and its signals."""
    sys.stdout.flush()
    sys.stderr.flush()
    program = setup.command[0]
    words = [*setup.command, *setup.flags, *arguments]
    try:
        os.execvpe(program, words, setup.environment(dict(os.environ)))  # noqa: S606
    except OSError as error:
        raise LaunchError(f"cannot start {program}: {error.strerror}") from None


def command_line(arguments: argparse.Namespace) -> str:
    """The one that was given, without the key itself."""
    words = ["xgen-proxy", "launch", arguments.client.name]
    key = "KEY" if arguments.key else None
    for flag, value in (("--url", arguments.url), ("--key", key), ("--model", arguments.model)):
        words += [flag, value] if value else []
    return shlex.join(words)
