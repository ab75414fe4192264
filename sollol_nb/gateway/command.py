"""The gateway's command line. It imports the extra only when it runs, so that it can report what is missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sollol_nb.errors import ConfigError, SollolError
from sollol_nb.settings import config

INSTALL_COMMAND = "pip install 'sollol_nb[gateway]'"
_EXTRA = ("starlette", "uvicorn", "h11", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the gateway's arguments to a parser."""
    add = parser.add_argument
    add("--host", help="address to listen on; beyond this machine a key is required (default: 127.0.0.1)")
    add("--port", type=int, help="port to listen on; 0 is any free one (default: 11440)")
    add("--tls-cert", metavar="FILE", help="certificate as PEM, for HTTPS")
    add("--tls-key", metavar="FILE", help="its private key as PEM")
    add("--require-key", action="store_true", help="require a key from this machine as well")
    add("--allow-host", metavar="NAME", action="append", default=[], help="a further name of this machine in URLs")
    add(
        "--allow-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="allow requests of web pages of this origin, such as https://chat.example.org",
    )
    add("--max-requests", type=int, metavar="N", help="requests that run or wait at the same time (default: 1024)")
    add("--drain", type=float, metavar="SECONDS", help="limit for running requests after a signal (default: 30)")
    add("--log", metavar="FILE", help="log of requests; - is stderr (default: a file in the state folder)")


def run(arguments: argparse.Namespace) -> int:
    """Run a gateway until it is stopped; returns the exit code.

    Raises:
        SollolError: it cannot start.
    """
    try:
        from sollol_nb.gateway.limits import DEFAULT_MAX_REQUESTS
        from sollol_nb.gateway.server import DEFAULT_DRAIN_S, ServeOptions, serve
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        raise ConfigError(f"the gateway needs {missing}, which is missing; run {INSTALL_COMMAND}") from None
    port = config.or_default(arguments.port, "gateway_port")
    drain_s = DEFAULT_DRAIN_S if arguments.drain is None else arguments.drain
    max_requests = DEFAULT_MAX_REQUESTS if arguments.max_requests is None else arguments.max_requests
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port} must be 0 to 65535")
    if not 0 <= drain_s <= 24 * 3600:
        raise ConfigError(f"--drain {drain_s:g} must be 0 to 86400 seconds")
    if max_requests < 1:
        raise ConfigError(f"--max-requests {max_requests} must be 1 or more")
    serve(
        ServeOptions(
            host=config.or_default(arguments.host, "gateway_host"),
            port=port,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            hosts=tuple(arguments.allow_host),
            origins=tuple(arguments.allow_origin),
            requires_key=arguments.require_key,
            drain_s=drain_s,
            log=arguments.log,
            max_requests=max_requests,
        )
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sollol_nb.gateway`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sollol_nb.gateway", description="Serve the cluster to other programs and notebooks."
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except SollolError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before it listens; then a signal drains it
        print("gateway: interrupted", file=sys.stderr)
        return 130
