"""`sollol-nb worker`: run workers of this machine for others, until the terminal ends or Ctrl-C is pressed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT, LOOPBACK, format_endpoint, is_loopback, parse_endpoint
from sollol_nb.settings.kinds import keep_alive_seconds

DEFAULT_GIVE_UP = "10m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument(
        "--join",
        metavar="LINK",
        help="dial the machine that made this join link, and listen on no network; - reads it from stdin, so that "
        "process lists do not show it (default: SOLLOL_JOIN)",
    )
    parser.add_argument(
        "--give-up",
        metavar="TIME",
        default=DEFAULT_GIVE_UP,
        help="with --join: end when that machine has been unreachable for this long (default: 10m)",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="end when stdin does: with the program that writes to it"
    )
    parser.add_argument(
        "--host", metavar="ADDRESS", help=f"without --join: listen on this address (default: {LOOPBACK})"
    )
    parser.add_argument(
        "--port", type=int, help=f"without --join: listen on this port (default: {DEFAULT_RPC_PORT})"
    )
    parser.add_argument(
        "--announce",
        action="store_true",
        help="without --join: announce the worker in the local network by mDNS, for `sollol-nb discover --mdns`",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the usable cores)")
    parser.add_argument(
        "--device",
        metavar="NAMES",
        help="llama.cpp's names of devices, such as CUDA0,CUDA1 (default: all GPUs, or CPU)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run workers until they are no longer wanted; returns the exit code.

    Raises:
        SollolError: they cannot be started, or the invitation cannot be used.
    """
    from sollol_nb.llama_cpp.links.join_link import JoinLink

    text = _join_text(arguments)
    link = None if text is None else JoinLink.of(text)
    if link is not None and (arguments.host is not None or arguments.port is not None):
        raise ConfigError("--host and --port are for a worker that listens; with --join nothing listens")
    if link is not None and arguments.announce:
        raise ConfigError("--announce is for a worker that listens; with --join nothing listens")
    if arguments.threads is not None and not 1 <= arguments.threads <= 4096:
        raise ConfigError(f"--threads is {arguments.threads}; give a number from 1 to 4096")
    host, port = arguments.host or LOOPBACK, DEFAULT_RPC_PORT if arguments.port is None else arguments.port
    parse_endpoint(format_endpoint(host, port))
    if link is None:
        return _until_ended(_serve(arguments, host, port), at_eof=arguments.until_eof)
    give_up_s = keep_alive_seconds(arguments.give_up)
    joined = _join(arguments, link, float("inf") if give_up_s is None else give_up_s)
    return _until_ended(joined, at_eof=arguments.until_eof)


def _join_text(arguments: argparse.Namespace) -> str | None:
    if arguments.join == "-":
        return sys.stdin.readline()
    return arguments.join or config.join_link()


def say(text: str) -> None:
    """Show one line to the user."""
    print(f"sollol-nb: {text}", file=sys.stderr, flush=True)


def _until_ended(serving: Coroutine[Any, Any, int], *, at_eof: bool) -> int:
    """Run it; a signal that ends the terminal or the service ends it properly, and with `at_eof` stdin's end."""

    async def main() -> int:
        task = asyncio.current_task()
        assert task is not None
        if sys.platform != "win32":
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        if at_eof:
            loop = asyncio.get_running_loop()
            threading.Thread(target=_cancel_at_eof, args=(loop, task), daemon=True).start()
        return await serving

    with contextlib.suppress(asyncio.CancelledError):
        return asyncio.run(main())
    return 0


def _cancel_at_eof(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    # Not through the file object, whose lock a waiting thread would hold while the interpreter ends.
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(task.cancel)


def _devices(arguments: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in (arguments.device or "").split(",")]
    if arguments.device is not None and not all(name.isalnum() for name in names):
        raise ConfigError(f"--device {arguments.device!r} is not a list of devices, such as CUDA0,CUDA1")
    return names if arguments.device is not None else []


async def _serve(arguments: argparse.Namespace, host: str, port: int) -> int:
    from sollol_nb.llama_cpp.engine.find import ensure_engine
    from sollol_nb.llama_cpp.processes.machine import usable_cores
    from sollol_nb.llama_cpp.workers.announcements import announced, check_announceable
    from sollol_nb.llama_cpp.workers.lent import CPU, LentWorkers

    given = _devices(arguments)
    if arguments.announce:
        check_announceable(host)
    engine = await asyncio.to_thread(ensure_engine)
    threads = arguments.threads or usable_cores()
    # One process offers all devices; by default it takes all GPUs, or the CPU.
    workers = LentWorkers(engine, [",".join(given) or CPU], threads=threads, say=say)
    try:
        await workers.start(host, port)
        endpoint = format_endpoint(host, port)
        say(f"a worker listens on {endpoint}; Ctrl-C ends it")
        if not is_loopback(endpoint):
            say(
                f"warning: whoever can connect to {endpoint} can use it, without a password and unencrypted; use "
                "it only in a network that you trust, or `sollol-nb worker --join`"
            )
        async with contextlib.AsyncExitStack() as announcing:
            if arguments.announce:
                endpoints = await announcing.enter_async_context(announced(host, port, version=engine.version))
                say(f"announced to the local network as {', '.join(endpoints)}")
            await asyncio.Event().wait()
    finally:
        await workers.stop()
    return 0


async def _join(arguments: argparse.Namespace, link: Any, give_up_s: float) -> int:
    from sollol_nb.llama_cpp.engine.find import ensure_engine
    from sollol_nb.llama_cpp.links.join_link import Build, Facts
    from sollol_nb.llama_cpp.links.joining import Membership
    from sollol_nb.llama_cpp.processes.machine import machine_id, usable_cores
    from sollol_nb.llama_cpp.workers.lent import LentWorkers, devices_of

    devices = _devices(arguments)
    engine = await asyncio.to_thread(ensure_engine)
    facts = Facts(
        host=platform.node().partition(".")[0] or "worker",
        machine=machine_id(),
        devices=tuple(devices or await asyncio.to_thread(devices_of, engine)),
        threads=arguments.threads or usable_cores(),
        build=Build.of(engine.version, engine.protocol),
        give_up_s=give_up_s,
        verifies=True,
    )
    workers = LentWorkers(engine, facts.devices, threads=facts.threads, say=say, caches=True)
    try:
        why = await Membership(link, facts, workers.start, say, workers.verify).serve()
    finally:
        await workers.stop()
    say(f"{link.address} has ended the connection: {why}")
    return 0
