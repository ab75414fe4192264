"""The gateway's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sollol_nb.errors import SollolError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the gateway's arguments to a parser."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, default=11440, help="default: 11440")


def run(arguments: argparse.Namespace) -> int:
    """Run a gateway until it is stopped; returns the exit code.

    Raises:
        SollolError: it cannot start.
    """
    from sollol_nb.gateway.server import serve

    serve(arguments.host, arguments.port)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sollol_nb.gateway`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sollol_nb.gateway", description="Serve a cluster to other programs."
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except SollolError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
