"""The command line, called in the process of the tests."""

from __future__ import annotations

from xgen_proxy import cli


def status_of(*arguments: str) -> int:
    """The exit status of `xgen-proxy ARGUMENTS`."""
    try:
        return cli.main([*arguments])
    except SystemExit as end:  # from argparse
        return end.code if isinstance(end.code, int) else 1
