"""`sollol-nb invite` and `sollol-nb revoke`: invitations for workers that dial in."""

from __future__ import annotations

import argparse
import sys

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import ensure_engine
from sollol_nb.llama_cpp.workers import invited
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import io_bound, run_blocking
from sollol_nb.settings import config


def invite(arguments: argparse.Namespace) -> int:
    """Make an invitation and print the command to run on the machine that joins; returns the exit code."""
    engine = ensure_engine()

    async def here() -> Engine:
        return engine

    @io_bound
    async def made() -> invited.NewInvitation:
        links = Workers((), EventBus()).links
        try:
            return await invited.invite(
                links,
                here,
                uses=arguments.uses,
                expires=arguments.duration,
                name=arguments.name,
                host=arguments.host,
                port=arguments.port,
                keep_alive_s=config.default_keep_alive_s(),
            )
        finally:
            links.detach()

    invitation = run_blocking(made())
    print(invitation.command)
    print(str(invitation).partition("\n")[2], file=sys.stderr)
    return 0


def revoke(arguments: argparse.Namespace) -> int:
    """Withdraw invitations and end the workers that joined; returns the exit code."""
    names = [name for wanted in arguments.names or [None] for name in run_blocking(invited.revoke(wanted))]
    print(f"revoked {', '.join(names)}" if names else "no invitation is open, and no worker has joined")
    return 0
