"""Hosts for the notebook about several machines: each is an sshd of your own on this machine's loopback.

Real hosts need none of this: what `ssh gpu1` reaches, `ssh://gpu1` uses.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_LIMIT_S = 10.0


@dataclass(frozen=True)
class SshHost:
    """A host that accepts a key made for it.

    Attributes:
        name: as in the configuration of ssh.
        address, port: where its sshd listens.
        folder: its files; `home` in it is the HOME of those who log in.
    """

    name: str
    address: str
    port: int
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """HOME and XDG folders of those who log in: empty ones, as on a new machine."""
        home = self.folder / "home"
        return {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "XDG_STATE_HOME": str(home / ".local" / "state"),
        }

    def write_files(self, public_key: str, options: Mapping[str, str] | None = None) -> Path:
        """Write its keys and its sshd's configuration, with more options; returns the configuration's path."""
        (self.folder / "home").mkdir(parents=True, mode=0o700, exist_ok=True)
        if not (self.folder / "host_key").exists():
            make_key(self.folder / "host_key")
        (self.folder / "authorized_keys").write_text(public_key)
        lines = {
            "Port": str(self.port),
            "ListenAddress": self.address,
            "HostKey": str(self.folder / "host_key"),
            "AuthorizedKeysFile": str(self.folder / "authorized_keys"),
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "PrintMotd": "no",
            "SetEnv": " ".join(f"{name}={value}" for name, value in self.environment.items()),
        }
        config = self.folder / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in {**lines, **(options or {})}.items()))
        return config


def kill_family(pid: int) -> None:
    """Kill a process and all that it has started; an sshd has a process for each connection."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def find_sshd() -> str | None:
    """The path of the sshd program; None if it is not installed."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def make_key(path: Path) -> None:
    """Make a key pair without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=30)


def write_client_files(folder: Path, hosts: Sequence[SshHost]) -> str:
    """Write the ssh program's configuration and known hosts; returns the command that uses them."""
    known_hosts, config = [], []
    for host in hosts:
        kind, public = (host.folder / "host_key.pub").read_text().split()[:2]
        known_hosts.append(f"[{host.address}]:{host.port},{host.address} {kind} {public}\n")
        config.append(
            f"Host {host.name}\n  HostName {host.address}\n  Port {host.port}\n  User {getpass.getuser()}\n"
        )
    (folder / "known_hosts").write_text("".join(known_hosts))
    config.append(
        f"Host *\n  IdentityFile {folder / 'key'}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder / 'known_hosts'}\n  GlobalKnownHostsFile /dev/null\n"
        f"  StrictHostKeyChecking yes\n"
    )
    (folder / "ssh_config").write_text("".join(config))
    return f"ssh -F {folder / 'ssh_config'}"


class LoopbackHosts:
    """Several sshd on this machine's loopback.

    Attributes:
        ssh: the command of the ssh program that reaches them, for the setting `ssh`.
        folder: their files.
    """

    def __init__(self, *names: str) -> None:
        sshd = find_sshd()
        if sshd is None:
            raise RuntimeError("sshd is not installed; run: sudo apt-get install openssh-server")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # where sshd, as root, gives up its privileges
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        make_key(self.folder / "key")
        public_key = (self.folder / "key.pub").read_text()
        hosts = [SshHost(name, "127.0.0.1", _free_port(), self.folder / name) for name in names]
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        atexit.register(self.close)  # a notebook's kernel may be stopped before its last cell
        for host in hosts:
            command = [sshd, "-D", "-e", "-f", host.write_files(public_key)]
            with (host.folder / "sshd.log").open("wb") as log:
                self._servers[host.name] = subprocess.Popen(command, stderr=log, start_new_session=True)
        self.ssh = write_client_files(self.folder, hosts)
        for host in hosts:
            _wait_until_it_listens(host)

    def cut(self, name: str) -> None:
        """Cut the connections to a host, and accept no new ones."""
        server = self._servers.pop(name)
        kill_family(server.pid)
        server.wait()

    def close(self) -> None:
        """End all."""
        for name in [*self._servers]:
            self.cut(name)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_until_it_listens(host: SshHost) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        with socket.socket() as trial:
            if trial.connect_ex((host.address, host.port)) == 0:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"sshd does not answer: {(host.folder / 'sshd.log').read_text()}")
        time.sleep(0.02)
