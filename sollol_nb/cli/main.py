"""The `sollol-nb` command: one function per subcommand, each returning the exit code.

A subcommand is a line in `_SUBCOMMANDS`: its function (whose docstring is the help text) and a function that
adds its arguments. A function imports what it needs, so that `sollol-nb --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import Enum
from typing import Any

from sollol_nb._version import __version__
from sollol_nb.cli import slurm as slurm_command
from sollol_nb.cli import worker as worker_command
from sollol_nb.errors import PullInterrupted, SollolError
from sollol_nb.gateway import command as gateway_command
from sollol_nb.llama_cpp.engine.tools import BACKENDS
from sollol_nb.settings import config
from sollol_nb.settings.kinds import entries

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_ATTENTION = 3
EXIT_INTERRUPTED = 130


def install(arguments: argparse.Namespace) -> int:
    """Build llama.cpp and install it in the cache folder, unless a working build is installed."""
    from sollol_nb.llama_cpp.engine.find import install_engine

    engine = install_engine(backend=arguments.backend, force=arguments.force)
    print(f"llama.cpp {engine.version} is installed in {engine.server.parent}")
    own = config.find("llama_cpp")
    if own.value is not None:
        print(
            f"{own.value} is used instead, because {own.source} sets llama_cpp; remove that to use the new build"
        )
    return EXIT_OK


def doctor(arguments: argparse.Namespace) -> int:
    """Look for the engine, build tools, settings and Ollama on this machine; show how to fix what is missing."""
    from sollol_nb.cli.doctor import describe, diagnose

    diagnosis = diagnose(check=arguments.check)
    if arguments.json:
        print(json.dumps(diagnosis.as_plain_data(), indent=1))
    else:
        print(describe(diagnosis))
    return EXIT_OK if diagnosis.usable else EXIT_ERROR


def ps(arguments: argparse.Namespace) -> int:
    """List the running coordinators and workers of all notebooks."""
    from sollol_nb.llama_cpp.processes.running import as_table, running_engines
    from sollol_nb.runtime.io_loop import run_blocking

    engines = run_blocking(running_engines())
    print(json.dumps([engine.as_dict() for engine in engines], indent=1) if arguments.json else as_table(engines))
    return EXIT_OK


def status(arguments: argparse.Namespace) -> int:
    """Show workers, layers and Ollama nodes. Exit code 0: all is well; 3: something needs attention."""
    from sollol_nb.cli.status import user_cluster, verdict
    from sollol_nb.runtime.io_loop import run_blocking

    cluster = run_blocking(user_cluster())
    if arguments.json:
        plain = {**asdict(cluster), "troubles": cluster.problems}
        del plain["live"]
        print(json.dumps(plain, indent=1, default=_as_json))
    else:
        print(cluster.describe(verbose=arguments.verbose))
        print(verdict(cluster))
    return EXIT_ATTENTION if cluster.problems else EXIT_OK


def _as_json(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else str(value)


def discover(arguments: argparse.Namespace) -> int:
    """Look for workers that could be used. Starts nothing, and contacts other machines only if you name them."""
    from sollol_nb.cli.discover import found_workers
    from sollol_nb.llama_cpp.workers.discovery import as_table
    from sollol_nb.runtime.io_loop import run_blocking

    found = run_blocking(found_workers(ssh=arguments.ssh, scan=arguments.scan, mdns=arguments.mdns))
    print(json.dumps([each.as_dict() for each in found], indent=1) if arguments.json else as_table(found))
    return EXIT_OK


def calibrate(arguments: argparse.Namespace) -> int:
    """Measure how fast workers and this machine are. Exit code 3: a worker could not be measured."""
    from sollol_nb.cli.calibrate import calibrate_workers
    from sollol_nb.runtime.io_loop import run_blocking

    def show(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    results = run_blocking(calibrate_workers(arguments.workers, show))
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    return EXIT_ATTENTION if any(result.problem for result in results) else EXIT_OK


def stop(arguments: argparse.Namespace) -> int:
    """Stop coordinators and workers: the unused ones, the named ones, or all."""
    from sollol_nb.llama_cpp.processes.running import running_engines, stop_engines
    from sollol_nb.runtime.io_loop import run_blocking

    for engine in run_blocking(stop_engines(arguments.names, also_used=arguments.all)):
        print(f"stopped {engine.kind} {engine.name} (pid {engine.pid})")
    for engine in run_blocking(running_engines()) if not arguments.names else ():
        left = f"{engine.kind} {engine.name} (pid {engine.pid}), {engine.state}"
        print(f"left running: {left}; use --all to stop it too")
    return EXIT_OK


def contexts(arguments: argparse.Namespace) -> int:
    """List the saved contexts of conversations, which need not be processed again; or delete some (--forget)."""
    from sollol_nb.cli.contexts import as_table, forget, listed, total
    from sollol_nb.errors import ConfigError

    everything = listed()
    is_chosen = arguments.ids or arguments.model is not None
    chosen = listed(arguments.ids, arguments.model) if is_chosen else everything
    if arguments.forget:
        if bool(is_chosen) == arguments.all:
            raise ConfigError("say which contexts to forget: their ids, --model MODEL, or --all")
        print(forget(chosen))
    elif arguments.json:
        limit_bytes = int(config.default("context_cache_gb") * 1e9)
        size = sum(each.context.size for each in everything)
        shown = {"contexts": [each.as_dict() for each in chosen], "bytes": size, "limit_bytes": limit_bytes}
        print(json.dumps(shown, indent=1))
    else:
        print(as_table(chosen))
        print(total([each.context for each in everything]))
    return EXIT_OK


def weights(arguments: argparse.Namespace) -> int:
    """Show how much workers of this machine keep of models, which a reload need not send; or delete it."""
    from sollol_nb.cli.weights import describe, forget

    print(forget() if arguments.forget else describe())
    return EXIT_OK


def pull(arguments: argparse.Namespace) -> int:
    """Download a model from the Hugging Face Hub, and give it a short name. Run again, it continues."""
    from sollol_nb.cli.pulling import pull

    print(pull(arguments.model, arguments.name))
    return EXIT_OK


def trust(arguments: argparse.Namespace) -> int:
    """Show which settings of a folder's sollol_nb.toml need your consent; give or withdraw it."""
    from sollol_nb.settings.trust import review

    print(review(arguments.file, "sollol-nb trust", give=arguments.yes, withdraw=arguments.revoke))
    return EXIT_OK


def worker(arguments: argparse.Namespace) -> int:
    """Run workers of this machine: for the machine that invited it (--join), or on an address of this one."""
    return worker_command.run(arguments)


def invite(arguments: argparse.Namespace) -> int:
    """Invite workers of machines that can only dial out; prints the command to run there."""
    from sollol_nb.cli.inviting import invite

    return invite(arguments)


def revoke(arguments: argparse.Namespace) -> int:
    """Withdraw invitations, and end the workers that have joined with them."""
    from sollol_nb.cli.inviting import revoke

    return revoke(arguments)


def gateway(arguments: argparse.Namespace) -> int:
    """Serve the cluster to other programs and notebooks, with the APIs of Ollama, OpenAI and Anthropic."""
    return gateway_command.run(arguments)


def key(arguments: argparse.Namespace) -> int:
    """Make, list or remove the gateway's API keys."""
    from sollol_nb.gateway.keys import Key, Keys, add_key, remove_key
    from sollol_nb.settings.kinds import PRIORITY

    if arguments.action == "add":
        made = Key(
            name=arguments.name,
            priority=PRIORITY.checked(PRIORITY.from_text(arguments.priority), "--priority"),
            may_control=arguments.control,
            max_requests=arguments.max_requests,
            requests_per_minute=arguments.per_minute,
        )
        print(add_key(made))
        print("this key cannot be shown again: only a hash of it is kept", file=sys.stderr)
    elif arguments.action == "remove":
        remove_key(arguments.name)
        print(f"removed the key {arguments.name}")
    else:
        keys = Keys().all
        print("\n".join(map(str, keys)) if keys else "no keys exist; `sollol-nb key add NAME` makes one")
    return EXIT_OK


def slurm(arguments: argparse.Namespace) -> int:
    """Write a job script for Slurm whose nodes join this machine as workers; submit it with sbatch."""
    return slurm_command.run(arguments)


def _install_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, help="default: that of the GPU toolkit found here, else cpu"
    )
    parser.add_argument("--force", action="store_true", help="build even if a working build is installed")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="run llama.cpp's two programs once, to check them")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _ps_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON; `troubles` lists what needs attention")
    parser.add_argument("-v", "--verbose", action="store_true", help="with all reasons of each layer plan")


def _discover_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ssh",
        type=entries,
        default=[],
        metavar="HOSTS",
        help="hosts to look at through ssh, separated by commas, such as gpu1,user@gpu2:2222",
    )
    parser.add_argument(
        "--scan",
        metavar="NETWORK",
        help="connect to the usual ports of all addresses of a private network, such as 192.168.1.0/24",
    )
    parser.add_argument(
        "--mdns", action="store_true", help="look for workers that are announced in the local network"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workers",
        nargs="*",
        metavar="WORKER",
        help="host:port, or ssh://host; default: this machine and all workers of this user",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _stop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a model, a worker's host:port, a machine's ssh://host, or an id of `sollol-nb ps --json`",
    )
    parser.add_argument("--all", action="store_true", help="also stop those in use")


def _contexts_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these; the beginning of an id is enough")
    parser.add_argument("--model", metavar="MODEL", help="only those of this model")
    parser.add_argument("--forget", action="store_true", help="delete those that are named")
    parser.add_argument("--all", action="store_true", help="with --forget: delete all")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", action="store_true", help="delete all of it; not while a model is loading")


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="hf.co/user/repo, hf.co/user/repo:quant or hf.co/user/repo:file.gguf"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the model (default: the repository's, in lower case without -GGUF)"
    )


def _trust_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="a settings file or its folder; default: the one in use here")
    parser.add_argument("--yes", action="store_true", help="let these settings count, until the file changes")
    parser.add_argument("--revoke", action="store_true", help="ignore them again")


def _key_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    add = actions.add_parser("add", help="make a key and print it")
    add.add_argument("name", metavar="NAME", help="name of the key's user, for the log")
    add.add_argument(
        "--priority",
        default="normal",
        metavar="N",
        help="highest priority of its requests: 1 to 10, or a name such as high",
    )
    add.add_argument("--max-requests", type=int, metavar="N", help="requests at the same time")
    add.add_argument("--per-minute", type=int, metavar="N", help="requests in a minute")
    add.add_argument(
        "--control", action="store_true", help="may also change the cluster, pull models and name model files"
    )
    actions.add_parser("list", help="list the names, priorities and limits of the keys")
    remove = actions.add_parser("remove", help="remove a key; the gateway refuses it from then on")
    remove.add_argument("name", metavar="NAME")


def _invite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="name of the workers (default: the name of their machine)"
    )
    parser.add_argument("--uses", type=int, default=1, metavar="N", help="how many machines may join (default: 1)")
    parser.add_argument("--for", dest="duration", default="1h", metavar="TIME", help="for how long (default: 1h)")
    parser.add_argument("--host", metavar="ADDRESS", help="listen here (default: this machine's own address)")
    parser.add_argument("--port", type=int, help="listen on this port (default: as before, at first any free one)")


def _revoke_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="invitations or joined workers (default: all)")


_SUBCOMMANDS: tuple[tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None]], ...] = (
    (install, _install_arguments),
    (doctor, _doctor_arguments),
    (ps, _ps_arguments),
    (status, _status_arguments),
    (discover, _discover_arguments),
    (calibrate, _calibrate_arguments),
    (stop, _stop_arguments),
    (contexts, _contexts_arguments),
    (weights, _weights_arguments),
    (pull, _pull_arguments),
    (trust, _trust_arguments),
    (gateway, gateway_command.add_arguments),
    (key, _key_arguments),
    (worker, worker_command.add_arguments),
    (invite, _invite_arguments),
    (revoke, _revoke_arguments),
    (slurm, slurm_command.add_arguments),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sollol-nb", description="Run sharded and Ollama models from notebooks.")
    parser.add_argument("--version", action="version", version=f"sollol_nb {__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for function, add_arguments in _SUBCOMMANDS:
        summary = (function.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(function.__name__, help=summary, description=summary)
        add_arguments(subparser)
        subparser.set_defaults(run=function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. An error of this package is one line on stderr."""
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # what nobody reads fails here, not while the interpreter ends
    except BrokenPipeError:
        # The reader has gone, as `head` does. What is still buffered goes nowhere, so that the flush at the end of
        # the interpreter does not fail, too: https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except SollolError as error:
        print(f"sollol-nb: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt as stop:
        print(f"sollol-nb: {stop if isinstance(stop, PullInterrupted) else 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code
