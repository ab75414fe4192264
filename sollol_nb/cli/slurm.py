"""The command `sollol-nb slurm`: a job script whose nodes become workers of this machine.

The script starts one worker on each node. The workers join by an invitation, whose link is in a private file of
the state folder, which the nodes see since they share the home folder. It is neither in the script nor in
arguments, which all users of a cluster can read.
"""

from __future__ import annotations

import argparse
import re
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown
from sollol_nb.runtime.private_files import private_folder, write_private
from sollol_nb.settings import config
from sollol_nb.text.tables import counted

MAX_NODES = 64
DEFAULT_EXPIRES = "168h"
"""Jobs may wait long for their nodes."""
LONGEST_S = 30 * 86400.0
"""Of an invitation."""
LINKS = "join_links"
"""Name of the folder of links in the state folder."""
_WORD = re.compile(r"[\w.,:+@/-]+")
_SBATCH_OPTION = re.compile(r"--?[A-Za-z][\w-]*([= ][^\s\"'\\]+)?")


_SCRIPT = """\
#!/bin/sh
{asked}
# One worker on each node. It joins by the link in this file, which only you can read, and ends with the job.
# What it writes stays on its node: the state of processes must not be shared between machines.
link={link}
exec {step} sh -c '
    trap : TERM INT HUP
    SOLLOL_STATE_DIR=$(mktemp -d) || exit
    export SOLLOL_STATE_DIR
    "$@" < "$0"
    code=$?
    rm -rf "$SOLLOL_STATE_DIR"
    exit $code
' "$link" {worker}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a job asks Slurm for.

    Attributes:
        nodes: how many, with one worker each.
        partition, time_limit: as Slurm writes them, such as `2:00:00`; None is the cluster's default.
        gpus: of each node.
        threads: of each worker, which are also the cores that it gets; None is Slurm's default.
        options: further options of sbatch, such as `--account=physics`.
    """

    nodes: int
    partition: str | None = None
    time_limit: str | None = None
    gpus: int | None = None
    threads: int | None = None
    options: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        _check_count("--nodes", self.nodes, MAX_NODES)
        for flag, count in (("--gpus", self.gpus), ("--threads", self.threads)):
            if count is not None:
                _check_count(flag, count, 1024)
        for flag, text in (("--partition", self.partition), ("--time", self.time_limit)):
            if text is not None and not _WORD.fullmatch(text):
                raise ConfigError(f"{flag} {shown(text)} cannot be written into a job script")
        for option in self.options:
            if not _SBATCH_OPTION.fullmatch(option):
                raise ConfigError(f"{shown(option)} is not an option of sbatch; write it as --account=NAME")


def job_script(job: Job, link_path: Path) -> str:
    """The script for sbatch.

    Args:
        link_path: the private file with the join link, which the nodes can read.
    """
    asked = ["--job-name=sollol-workers", f"--nodes={job.nodes}", "--ntasks-per-node=1"]
    if job.partition is not None:
        asked.append(f"--partition={job.partition}")
    if job.time_limit is not None:
        asked.append(f"--time={job.time_limit}")
    if job.gpus is not None:
        asked.append(f"--gpus-per-node={job.gpus}")
    if job.threads is not None:
        asked.append(f"--cpus-per-task={job.threads}")
    step = ["srun", f"--ntasks={job.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    worker = [sys.executable, "-P", "-m", "sollol_nb", "worker", "--join", "-"]
    if job.threads is not None:
        step.append(f"--cpus-per-task={job.threads}")  # since Slurm 22.05, a step does not inherit it from its job
        worker += ["--threads", str(job.threads)]
    return _SCRIPT.format(
        asked="\n".join(f"#SBATCH {option}" for option in [*asked, *job.options]),
        link=shlex.quote(str(link_path)),
        step=shlex.join(step),
        worker=shlex.join(worker),
    )


def keep_link(link: str) -> Path:
    """Write a join link to a private file, and remove the files whose links have expired.

    Raises:
        ConfigError: the file cannot be written.
    """
    folder = private_folder(config.state_dir() / LINKS)
    for path in folder.glob("*.link"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LONGEST_S:
                path.unlink()
    path = folder / f"{secrets.token_hex(8)}.link"
    try:
        write_private(path, f"{link}\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror or error})") from None
    return path


def _check_count(flag: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise ConfigError(f"{flag} is {shown(count)}; choose between 1 and {most}")


def run(arguments: argparse.Namespace) -> int:
    """Invite the nodes of a job, and write its script; returns the exit code.

    Raises:
        SollolError: an argument cannot be used, this machine cannot listen, or a file cannot be written.
    """
    from sollol_nb.sync_wrapper import HybridRouter

    job = Job(
        nodes=arguments.nodes,
        partition=arguments.partition,
        time_limit=arguments.time,
        gpus=arguments.gpus,
        threads=arguments.threads,
        options=arguments.options,
    )
    router = HybridRouter(gateway="local", rpc_backends=[], auto_discover_rpc=False)
    try:
        invitation = router.invite(
            uses=job.nodes, expires=arguments.expires, host=arguments.host, port=arguments.port
        )
        try:
            script = job_script(job, keep_link(invitation.link))
            if arguments.output is not None:
                _write(Path(arguments.output), script)
        except BaseException:
            router.revoke(invitation.name)
            raise
    finally:
        router.close(keep=True)  # the link listens on
    if arguments.output is None:
        print(script, end="")
    says = f"until {time.strftime('%Y-%m-%d %H:%M', time.localtime(invitation.expires_at))}"
    print(
        f"{counted(job.nodes, 'node')} may join {says}; `sollol-nb revoke {invitation.name}` ends that",
        file=sys.stderr,
    )
    return 0


def _write(path: Path, script: str) -> None:
    try:
        write_private(path, script)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror or error}); choose another file") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sollol-nb slurm`."""
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes, with one worker each")
    parser.add_argument("--partition", metavar="P", help="default: the cluster's")
    parser.add_argument(
        "--time", metavar="T", help="time limit of the job, such as 2:00:00; default: the cluster's"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of each node; default: none")
    parser.add_argument("--threads", type=int, metavar="N", help="cores of each worker; default: the cluster's")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="of this machine, as nodes reach it; default: its own on its network"
    )
    parser.add_argument("--port", type=int, help="on which this machine listens; default: a free one")
    parser.add_argument(
        "--expires",
        default=DEFAULT_EXPIRES,
        metavar="TIME",
        help="how long nodes may join; default: 168h, at most 720h",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the script here; default: print it")
    parser.add_argument(
        "options",
        nargs="*",
        metavar="OPTION",
        help="after `--`: further options of sbatch, such as --account=NAME",
    )
