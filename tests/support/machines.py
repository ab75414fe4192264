"""Several machines on this one: each is a network namespace with its own real sshd, host name, home and cache.

A namespace is connected by a veth pair to a bridge of the test's own namespace, so machines have addresses in one
network (10.213.N.0/24). Where the kernel forbids namespaces, each machine is an sshd on an address of 127.0.0.0/8.

The far side shares this machine's files, but its HOME and XDG folders are new, empty ones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from notebooks.ssh_hosts import SshHost, find_sshd, kill_family, make_key, write_client_files
from tests.support.engines import eventually

SSHD = find_sshd()
_numbers = itertools.count(1)


@dataclass
class Machine:
    """One machine.

    Attributes:
        host: its sshd's name, address and files.
        namespace: pid of the process that keeps its network namespace; None where the kernel forbids namespaces.
        ssh: the command of the ssh program that reaches it, as for the setting `ssh`.
    """

    host: SshHost
    namespace: int | None
    ssh: str = ""
    sshd: subprocess.Popen[bytes] | None = None
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def address(self) -> str:
        return self.host.address

    @property
    def home(self) -> Path:
        """HOME of those who log in."""
        return self.host.folder / "home"

    @property
    def target(self) -> str:
        """`ssh://name`."""
        return f"ssh://{self.name}"

    def command(self, *argv: str | Path) -> list[str]:
        """A command line that runs a program on this machine."""
        inside = [] if self.namespace is None else ["nsenter", "-t", str(self.namespace), "--net", "--uts", "--"]
        return [*inside, *map(str, argv)]

    def start(self, *argv: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this machine, with its HOME; it is ended with the machine."""
        environment = {**os.environ, **self.host.environment, **options.pop("env", {})}
        process = subprocess.Popen(self.command(*argv), env=environment, start_new_session=True, **options)
        self.started.append(process)
        return process

    def run(self, *argv: str | Path) -> str:
        """Run a program on this machine; returns its standard output."""
        environment = {**os.environ, **self.host.environment}
        done = subprocess.run(
            self.command(*argv), env=environment, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def start_sshd(self, **options: str) -> None:
        """Start its sshd, with more options for its configuration, such as `AllowTcpForwarding="no"`."""
        folder = self.host.folder
        config = self.host.write_files((folder / "authorized_keys").read_text(), options)
        assert SSHD is not None
        with (folder / "sshd.log").open("ab") as log:
            # One core: machines that share this one's cores would be slower with a thread for each.
            one_core = ["taskset", "-c", "0"] if shutil.which("taskset") else []
            self.sshd = self.start(*one_core, SSHD, "-D", "-e", "-f", config, stdout=log, stderr=log)

        def answers() -> bool:
            assert self.sshd is not None
            if self.sshd.poll() is not None:
                pytest.fail(f"sshd ended: {(folder / 'sshd.log').read_text()}")
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.address, self.host.port), timeout=1.0),
            ):
                return True
            return False

        eventually(answers, f"sshd of {self.name} answers")

    def restart_sshd(self, **options: str) -> None:
        """Start its sshd with other options; its connections end."""
        self.stop_sshd()
        self.start_sshd(**options)

    def stop_sshd(self) -> None:
        """End its sshd and all connections through it, as when the machine's sshd is restarted."""
        if self.sshd is not None:
            kill_family(self.sshd.pid)
            self.sshd.wait()
            self.sshd = None

    def listening(self) -> set[tuple[str, int]]:
        """Address and port of each TCP socket that listens on this machine, as `ss -tln` shows them."""
        lines = self.run("ss", "-tlnH").splitlines()
        pairs = [line.split()[3].rpartition(":") for line in lines]
        return {(address.strip("[]"), int(port)) for address, _, port in pairs}

    def processes(self) -> list[psutil.Process]:
        """The processes that run on this machine, except sshd itself and what the test has started there."""
        if self.namespace is None:
            known = [psutil.Process(self.sshd.pid)] if self.sshd else []
            found = [child for process in known for child in process.children(recursive=True)]
        else:
            identity = _network_of(self.namespace)
            found = [process for process in psutil.process_iter() if _network_of(process.pid) == identity]
        ours = {self.namespace, *(started.pid for started in self.started)}
        return [process for process in found if process.pid not in ours and _is_alive(process)]

    def workers(self) -> list[psutil.Process]:
        """The RPC workers that run on this machine."""
        return [process for process in self.processes() if "rpc-server" in _name_of(process)]

    def cut(self) -> None:
        """Cut its network silently: packets are lost, and nobody gets an error."""
        if self.namespace is not None:
            _ip("link", "set", _veth(self.namespace), "down")
        else:
            self._signal_sshd(signal.SIGSTOP)

    def connect_again(self) -> None:
        """The cut network works again."""
        if self.namespace is not None:
            _ip("link", "set", _veth(self.namespace), "up")
        else:
            self._signal_sshd(signal.SIGCONT)

    def _signal_sshd(self, number: signal.Signals) -> None:
        assert self.sshd is not None
        for process in _family(self.sshd.pid):
            if _name_of(process).startswith("sshd"):
                process.send_signal(number)

    def stop(self) -> None:
        """End all that runs on it."""
        self.stop_sshd()
        for started in self.started:
            kill_family(started.pid)
            started.wait()
        for process in self.processes() if self.namespace else ():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def running_machines(folder: Path, names: Sequence[str]) -> Iterator[list[Machine]]:
    """Machines with these names, each with a running sshd that accepts a key of the test.

    The variable `SOLLOL_SSH` has to be set to `ssh` of a machine for what connects to them.
    """
    if SSHD is None:
        pytest.fail("openssh-server is not installed; run: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # where sshd, as root, gives up its privileges
    folder.mkdir(exist_ok=True)
    key = folder / "key"
    make_key(key)
    with _network(names) as places:
        machines = []
        for name, (address, namespace) in zip(names, places, strict=True):
            port = 22 if namespace else _free_port(address)
            host = SshHost(name, address, port, folder / name)
            host.write_files(key.with_suffix(".pub").read_text())
            machines.append(Machine(host, namespace))
        ssh = write_client_files(folder, [machine.host for machine in machines])
        for machine in machines:
            machine.ssh = ssh
        try:
            for machine in machines:
                machine.start_sshd()
            yield machines
        finally:
            for machine in machines:
                machine.stop()


def _free_port(address: str) -> int:
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _network_of(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None


# --- the network ------------------------------------------------------------------------------


@contextlib.contextmanager
def _network(names: Sequence[str]) -> Iterator[list[tuple[str, int | None]]]:
    """(address, namespace) of each machine."""
    if not can_make_namespaces():
        yield [(f"127.0.{next(_numbers)}.{position + 1}", None) for position in range(len(names))]
        return
    number = _make_bridge()
    network, bridge = f"10.213.{number}", _bridge(number)
    try:
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        with contextlib.ExitStack() as stack:
            places: list[tuple[str, int | None]] = []
            for position, name in enumerate(names):
                address, namespace = f"{network}.{position + 2}", stack.enter_context(_namespace(name))
                veth = _veth(namespace)
                _ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", str(namespace))
                _ip("link", "set", veth, "master", bridge, "up")
                for step in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                    _ip(*step, namespace=namespace)
                _ip("link", "set", "lo", "up", namespace=namespace)
                places.append((address, namespace))
            yield places
    finally:
        _ip("link", "delete", bridge)


def _make_bridge() -> int:
    """Make a bridge; its number is that of no other one, since the kernel refuses names that are taken."""
    for number in range(1, 255):
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "add", _bridge(number), "type", "bridge")
            return number
    raise AssertionError("no bridge can be made, or this machine has 254 of them")


def _bridge(number: int) -> str:
    return f"sol{number}b"


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[int]:
    """A network namespace with a host name of its own; the pid of the process that keeps it, and ends with us."""
    keep = ["unshare", "--net", "--uts", "sh", "-c", 'hostname "$0" && echo && exec cat', name]
    keeper = subprocess.Popen(keep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert keeper.stdout is not None
    try:
        if not keeper.stdout.readline():
            raise PermissionError("this kernel forbids network namespaces")
        yield keeper.pid
    finally:
        keeper.kill()
        keeper.communicate()


def _veth(namespace: int) -> str:
    """The end of a namespace's cable on this side."""
    return f"sol{namespace}v"


def _ip(*arguments: str, namespace: int | None = None) -> None:
    inside = [] if namespace is None else ["nsenter", "-t", str(namespace), "--net", "--"]
    subprocess.run([*inside, "ip", *arguments], check=True, capture_output=True, timeout=30)


def can_make_namespaces() -> bool:
    """Whether this user and kernel can make network namespaces with veth pairs."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with _namespace("trial") as trial:
            _ip("link", "add", _veth(trial), "type", "veth", "peer", "name", "eth0", "netns", str(trial))
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="sol") as folder:
        yield Path(folder)


def wait_gone(machine: Machine, limit_s: float = 60.0) -> None:
    """Wait until nothing runs on a machine any more but what the test has started there."""
    deadline = time.monotonic() + limit_s
    while left := machine.processes():
        assert time.monotonic() < deadline, f"still running on {machine.name}: {left}"
        time.sleep(0.05)
