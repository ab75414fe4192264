"""Scripts on another machine through the real ssh program and a real sshd, and what is said where that fails."""

from __future__ import annotations

import asyncio
import re
import shlex
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from notebooks.ssh_hosts import make_key
from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.links import ssh_shell
from sollol_nb.llama_cpp.links.ssh_session import remote_command
from sollol_nb.llama_cpp.links.ssh_shell import FOLDER_PREFIX, Result, Shell
from tests.support.engines import HANG_GUARD_S, REPOSITORY, posix_only
from tests.support.machines import Machine, running_machines, short_folder

pytestmark = posix_only

ENDLESS = """
import contextlib, socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        with contextlib.suppress(OSError), server.accept()[0] as client:
            while True:
                client.sendall(bytes(1024 * 1024))
"""
ODD = "a b'c\"d!\n\\x$(echo q)`echo q`;é*|&"


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    """Two machines, `gpu1` and `gpu2`."""
    with short_folder() as folder, running_machines(folder, ["gpu1", "gpu2"]) as machines:
        yield machines


@pytest.fixture(scope="module")
def gpu1(machines: list[Machine]) -> Machine:
    return machines[0]


@pytest.fixture
def own_gpu1(gpu1: Machine) -> Iterator[Machine]:
    """The same machine for a test that changes its sshd."""
    yield gpu1
    gpu1.restart_sshd()


def ran(shell: Shell, script: str, *arguments: str, stdin: AsyncIterator[bytes] | None = None) -> Result:
    """Connect, run a script, and disconnect."""

    async def with_input(stdin: AsyncIterator[bytes]) -> Result:
        session = await shell.start(script, *arguments)
        feeding = asyncio.create_task(session.feed(stdin))
        try:
            stdout, code = await session.output(), await session.wait()
        finally:
            feeding.cancel()
            await session.end()
        return Result(code, stdout, "\n".join(session.errors))

    async def run() -> Result:
        async with asyncio.timeout(HANG_GUARD_S):
            try:
                await shell.open()
                return await (with_input(stdin) if stdin else shell.run(script, *arguments))
            finally:
                await shell.close()

    return asyncio.run(run())


def failure(machine: Machine, *options: str, target: str | None = None, script: str = "exit 0") -> str:
    """What is said where a machine cannot be used, with these options of ssh."""
    command = shlex.split(machine.ssh)
    with pytest.raises(LinkError) as caught:
        ran(Shell(target or machine.target, [*command, *options]), script)
    message = str(caught.value)
    assert "\n" not in message
    assert "debug1" not in message
    return message


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


# --- scripts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False], ids=["one connection", "a connection each, as on Windows"])
def test_a_script_gets_its_arguments_and_input_and_its_output_comes_back(gpu1: Machine, shares: bool) -> None:
    shell = Shell(gpu1.target, shlex.split(gpu1.ssh), shares=shares)
    result = ran(shell, 'printf %s "$1"; printf %s "$#" >&2; cat; exit 3', ODD, "", stdin=pieces(b"\x00input"))
    assert result == Result(3, f"{ODD}\x00input", "2")


def test_much_is_sent_and_output_is_cut(gpu1: Machine) -> None:
    much = pieces(*[b"x" * 100_000] * 30)
    result = ran(Shell(gpu1.target, shlex.split(gpu1.ssh)), 'wc -c >&2; yes | head -c "$1"', "2000000", stdin=much)
    assert result.stderr.strip() == "3000000"
    assert len(result.stdout) == 1024 * 1024


def test_a_script_need_not_read_all_its_input_and_does_not_wait_for_input_that_fails(gpu1: Machine) -> None:
    shell = Shell(gpu1.target, shlex.split(gpu1.ssh))
    assert ran(shell, "read -r line; echo $line", stdin=pieces(*[b"y\n" * 1000] * 10_000)).stdout == "y\n"

    async def failing() -> AsyncIterator[bytes]:
        yield b"some"
        raise OSError

    assert ran(shell, "cat", stdin=failing()).stdout == "some"


def test_the_command_for_the_login_shell_has_only_characters_that_every_shell_leaves_alone() -> None:
    command = remote_command(f"echo {shlex.quote(ODD)}", [ODD], "0123")
    fixed, _, encoded = command.partition("sh '")[2].rpartition("' sh '")
    assert re.fullmatch(r"(?:[\w ./:,=@%+-]|\\0[0-7]{3})*", encoded.removesuffix("'"), re.ASCII)
    assert not set(fixed) & set("\\!\n"), "fish and csh change these within single quotes"
    printed = subprocess.run(["sh", "-c", command], capture_output=True, check=True, text=True).stdout
    assert ODD in printed


def test_what_a_login_shell_prints_before_is_left_out(own_gpu1: Machine) -> None:
    noise = 'yes noise | head -n 2000; echo warning >&2; eval "$SSH_ORIGINAL_COMMAND"'
    own_gpu1.restart_sshd(ForceCommand=noise, Banner=str(own_gpu1.host.folder / "sshd_config"))
    result = ran(Shell(own_gpu1.target, shlex.split(own_gpu1.ssh)), "echo out; echo error >&2; exit 4")
    assert result == Result(4, "out\n", "error")


def test_a_user_and_a_port_are_used_and_a_long_folder_for_temporary_files_is_no_problem(
    gpu1: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 40)
    long.mkdir()
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [*shlex.split(gpu1.ssh), "-o", "HostKeyAlias=gpu1", "-o", "StrictHostKeyChecking=no"]
    target = f"ssh://root@{gpu1.address}:{gpu1.host.port}"
    assert ran(Shell(target, command), "id -un").stdout == "root\n"
    assert not list(long.iterdir())


def test_options_of_the_users_configuration_do_not_get_in_the_way(gpu1: Machine, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        options = (
            f"ControlPath {tmp_path}/own",
            "ControlMaster auto",
            "ControlPersist 60",
            "RemoteCommand echo no",
            "RequestTTY force",
            "LogLevel QUIET",
            f"LocalForward {taken.getsockname()[1]} localhost:22",
            "ExitOnForwardFailure yes",
        )
        config = tmp_path / "config"
        _, _, base = shlex.split(gpu1.ssh)
        config.write_text("\n".join(["Host gpu1", *options, "Host *", f"Include {base}", ""]))
        result = ran(Shell(gpu1.target, ["ssh", "-F", str(config)]), "echo out; [ -t 0 ] || echo no terminal")
    assert result == Result(0, "out\nno terminal\n", "")
    assert list(tmp_path.iterdir()) == [config]


def test_a_machine_behind_a_jump_host_is_reached(machines: list[Machine]) -> None:
    gpu1, gpu2 = machines
    jump = f"ProxyCommand={gpu1.ssh} -W %h:%p gpu1"
    assert ran(Shell(gpu2.target, [*shlex.split(gpu2.ssh), "-o", jump]), "hostname").code == 0


# --- failures ---------------------------------------------------------------------------------------


def test_an_unknown_host_key_is_shown_with_the_command_that_accepts_it(gpu1: Machine) -> None:
    options = ("-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=ask")
    printed = subprocess.run(
        ["ssh-keygen", "-lf", str(gpu1.host.folder / "host_key.pub")], capture_output=True, check=True, text=True
    )
    fingerprint = printed.stdout.split()[1]
    message = failure(gpu1, *options)
    assert message.startswith(f"gpu1: its host key (ssh-ed25519 {fingerprint}) is not known here")
    assert message.endswith(f"accept it once with `{gpu1.ssh} {' '.join(options)} gpu1`")


def test_a_changed_host_key_is_not_accepted(gpu1: Machine, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    kind, public = (tmp_path / "other.pub").read_text().split()[:2]
    known = tmp_path / "known"
    known.write_text(f"{gpu1.address} {kind} {public}\n[{gpu1.address}]:{gpu1.host.port} {kind} {public}\n")
    message = failure(gpu1, "-o", f"UserKnownHostsFile={known}")
    assert "has changed, and somebody may be in between" in message
    assert f"delete line 1 of {known}, and run `" in message


@pytest.mark.parametrize("passphrase", ["", "secret"], ids=["another key", "a key with a passphrase"])
def test_a_key_that_is_not_accepted_names_ssh_copy_id_and_ssh_add(
    gpu1: Machine, tmp_path: Path, passphrase: str
) -> None:
    key, config = tmp_path / "key", tmp_path / "config"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", key], check=True)
    config.write_text(
        f"Host gpu1\n  HostName {gpu1.address}\n  IdentityFile {key}\n  IdentityAgent none\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {gpu1.host.folder.parent / 'known_hosts'}\n"
    )
    message = failure(gpu1, "-F", str(config), target=f"ssh://root@gpu1:{gpu1.host.port}")
    assert message.startswith(
        "root@gpu1:22: it accepts no key without a password or passphrase (Permission denied"
    )
    assert message.endswith("run `ssh-copy-id -p 22 root@gpu1` once, or `ssh-add` if the key has a passphrase")


def test_a_port_without_sshd_a_name_that_is_unknown_and_a_silent_machine_have_a_line_each(
    machines: list[Machine],
) -> None:
    gpu1, gpu2 = machines
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    refused = failure(gpu1, "-o", "HostName=127.0.0.1", "-p", port)
    assert re.match(
        rf"gpu1: nothing accepts ssh there \(connect to .* port {port}: Connection refused\); start", refused
    )
    unknown = failure(gpu1, target="ssh://no-such-host.invalid")
    assert unknown.startswith(
        "no-such-host.invalid: unknown host (Could not resolve hostname no-such-host.invalid: "
    )
    gpu2.cut()
    try:
        silent = failure(gpu2, "-o", "ConnectTimeout=1")
    finally:
        gpu2.connect_again()
    assert "gpu2: it does not answer (" in silent
    assert "check that it runs, its address and the firewall" in silent


def test_a_jump_host_that_cannot_reach_the_machine_is_named_as_the_cause(machines: list[Machine]) -> None:
    gpu1, gpu2 = machines
    message = failure(gpu2, "-o", f"ProxyCommand={gpu1.ssh} -W %h:1 gpu1")
    assert message.startswith("the jump host of gpu2: it does not reach gpu2 (")
    assert "check ProxyJump" in message


def test_a_missing_program_names_the_setting(gpu1: Machine) -> None:
    with pytest.raises(LinkError, match=r"cannot run no-ssh \(No such file or directory\); .* set SOLLOL_SSH to"):
        ran(Shell(gpu1.target, ["no-ssh"]), "exit 0")
    with pytest.raises(LinkError, match="ssh ended without a message"):
        ran(Shell(gpu1.target, ["false"]), "exit 0")


def test_a_configuration_that_ssh_refuses_is_quoted(gpu1: Machine, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("NoSuchOption yes\n")
    message = failure(gpu1, "-F", str(config))
    assert "ssh does not accept its configuration (" in message
    assert str(config) in message


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("echo This service allows sftp connections only.", "This service allows sftp connections only."),
        ("/usr/sbin/nologin", "This account is currently not available."),
        ("true", "it printed nothing"),
    ],
)
def test_an_account_that_runs_no_commands_is_described(own_gpu1: Machine, command: str, printed: str) -> None:
    own_gpu1.restart_sshd(ForceCommand=command)
    message = failure(own_gpu1)
    assert message.startswith(f"gpu1: this account runs no commands ({printed}")
    assert "prints hello" in message


def test_an_sshd_that_allows_no_second_session_is_described(own_gpu1: Machine) -> None:
    own_gpu1.restart_sshd(MaxSessions="0")
    assert "set MaxSessions there to 10" in failure(own_gpu1)


# --- forwarding ------------------------------------------------------------------------------------


async def _forwarded(machine: Machine, remote_port: int, *, shares: bool) -> str:
    """Why a forwarded port is not reachable there; "" if it is."""
    shell = Shell(machine.target, shlex.split(machine.ssh), shares=shares)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    try:
        await shell.open()
        await shell.forward(port, remote_port)
        why = await shell.why_unreachable(port, remote_port)
        while not shares and "is not forwarded" in why:  # before it is connected
            why = await shell.why_unreachable(port, remote_port)
        await shell.stop_forwarding(port, remote_port)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
        return why
    finally:
        await shell.close()


@pytest.mark.parametrize("shares", [True, False], ids=["one connection", "a connection each, as on Windows"])
def test_a_forwarded_port_reaches_what_listens_there_or_says_that_nothing_does(
    gpu1: Machine, shares: bool
) -> None:
    listener = gpu1.start("sh", "-c", "exec python3 -m http.server --bind 127.0.0.1 8765 >/dev/null 2>&1")
    try:
        while ("127.0.0.1", 8765) not in gpu1.listening():
            assert listener.poll() is None
        assert asyncio.run(_forwarded(gpu1, 8765, shares=shares)) == ""
    finally:
        listener.kill()
        listener.wait()
    refused = asyncio.run(_forwarded(gpu1, 8766, shares=shares))
    assert refused == "gpu1: a connection through ssh failed (connect failed: Connection refused)"


def test_what_sends_without_end_is_not_kept(gpu1: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_shell, "REACH_LIMIT_S", 0.5)
    sender = gpu1.start(sys.executable, "-c", ENDLESS, stdout=subprocess.PIPE)
    assert sender.stdout is not None
    remote_port = int(sender.stdout.readline())
    tracemalloc.start()
    try:
        why = asyncio.run(_forwarded(gpu1, remote_port, shares=True))
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()
        sender.kill()
        sender.communicate()
    assert "no answer through port" in why


def test_an_sshd_that_forbids_forwarding_is_described(own_gpu1: Machine) -> None:
    own_gpu1.restart_sshd(AllowTcpForwarding="no")
    with pytest.raises(
        LinkError, match=r"^gpu1: its sshd forbids forwarding \(administratively prohibited: open failed"
    ):
        asyncio.run(_forwarded(own_gpu1, 8766, shares=True))


def test_the_folder_of_a_link_that_was_killed_is_removed_by_the_next_one(
    gpu1: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gpu1.host.folder.parent / "tmp"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    left = folder / f"{FOLDER_PREFIX}left"
    left.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left / "s"))
    ran(Shell(gpu1.target, shlex.split(gpu1.ssh)), "exit 0")
    assert not list(folder.iterdir())


def test_a_connection_that_ends_is_reported_with_its_reason(own_gpu1: Machine) -> None:
    async def lose() -> tuple[str, str]:
        shell = Shell(own_gpu1.target, shlex.split(own_gpu1.ssh))
        try:
            await shell.open()
            await asyncio.to_thread(own_gpu1.stop_sshd)
            why = await shell.lost()
            with pytest.raises(LinkError) as caught:
                await shell.run("exit 0")
            return why, str(caught.value)
        finally:
            await shell.close()

    why, later = asyncio.run(lose())
    assert why.startswith("gpu1: the connection was closed (")
    assert "Control socket" not in later


def test_the_machines_of_the_notebook_end_with_its_kernel(machines: list[Machine]) -> None:
    code = "from notebooks.ssh_hosts import LoopbackHosts\nprint(LoopbackHosts('a', 'b').folder)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=HANG_GUARD_S,
    )

    folder = done.stdout.strip()
    assert Path(folder).is_absolute()
    assert not Path(folder).exists()
    assert not [process for process in psutil.process_iter(["cmdline"]) if folder in str(process.info["cmdline"])]
