"""What the messages of the `ssh` program mean, and the command that helps, as one line.

The messages are OpenSSH's, which are not translated. Nothing depends on them but what people read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

SHOWN_CHARACTERS = 600
REFUSED_CONNECTION = re.compile(r"channel \d+: open failed: .*")
"""What the master prints for a connection that it could not carry to the other side."""

FORBIDDEN = "administratively prohibited"
"""In such a line: the other side's configuration does not allow it."""

_FINGERPRINT = re.compile(r"debug1: Server host key: (\S+) (\S+)")
_OFFENDING = re.compile(r"Offending \S+ key in (.+):(\d+)")
_DENIED = re.compile(r"(\S+@\S+): Permission denied")
_BROKEN_JUMP = re.compile(r"Connection closed by UNKNOWN port 65535")
"""ssh prints this after the messages of the ssh that connects to the jump host."""
_NOISE = re.compile(
    r"debug\d: |OpenSSH_|Warning: Permanently added|Authenticated to |Connection closed by UNKNOWN"
    r"|kex_exchange_identification: Connection closed|Transferred: |Bytes per second: |Connection to .* closed\.$"
    r"|@{5}|Control socket connect"
)


def is_wanted(line: str) -> bool:
    """Whether a line of ssh's output at LogLevel DEBUG1 says something about an error."""
    return not line.startswith("debug") or _FINGERPRINT.match(line) is not None


def explain(host: str, command: Sequence[str], lines: Iterable[str]) -> str:
    """Why ssh ended, and what to do.

    Args:
        host: the machine as the user calls it.
        command: the ssh program and its options, for commands to run.
        lines: the last lines that it printed.
    """
    lines = [line.strip() for line in lines]
    messages = [line for line in lines if line and not _NOISE.match(line)]
    text = "\n".join(messages)
    ssh = shlex.join([*command, *_login(host)])
    for pattern, meaning in _MEANINGS:
        found = re.search(pattern, text)
        if found is not None:
            who = f"the jump host of {host}" if any(map(_BROKEN_JUMP.search, lines)) else host
            return _cut(
                f"{who}: {meaning.format(ssh=ssh, host=host, found=found.group(0), **_facts(lines, host))}"
            )
    reason = messages[-1] if messages else "ssh ended without a message"
    return _cut(f"{host}: cannot connect ({reason}); run `{ssh}` to see why")


_MEANINGS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key{key} has changed, and somebody may be in between; if the machine was installed again, "
        "delete {known_hosts}, and run `{ssh}`",
    ),
    (
        r"Host key verification failed",
        "its host key{key} is not known here; check it, and accept it once with `{ssh}`",
    ),
    (
        r"agent refused operation|signing failed",
        "the ssh agent did not sign ({found}); unlock or touch the key while you run `{ssh}`, or run `ssh-add`",
    ),
    (
        r"UNPROTECTED PRIVATE KEY|bad permissions",
        "others can read the private key, so ssh does not use it; run `chmod 600` on it, then `{ssh}`",
    ),
    (
        r"Password change required.*|password has expired.*",
        "the password there has expired; log in with `{ssh}` and change it",
    ),
    (
        r"Too many authentication failures",
        "it refused too many keys of the ssh agent; name the right one in ~/.ssh/config as IdentityFile, with "
        "IdentitiesOnly yes",
    ),
    (
        r"Permission denied \(.*\)",
        "it accepts no key without a password or passphrase ({found}); run `ssh-copy-id {login}` once, or "
        "`ssh-add` if the key has a passphrase",
    ),
    (
        r"Could not resolve hostname .*",
        "unknown host ({found}); check the name, or add it to ~/.ssh/config",
    ),
    (
        r"connect to (host|address) .*: Connection refused",
        "nothing accepts ssh there ({found}); start sshd on it, or check the port",
    ),
    (
        r"(connect to (host|address) .*: )(Connection timed out|Operation timed out|No route to host|Network is "
        r"unreachable|Host is down)|Connection timed out during banner exchange",
        "it does not answer ({found}); check that it runs, its address and the firewall",
    ),
    (
        r"Timeout, server \S+ not responding",
        "the connection was cut: it has not answered for {alive_s} s",
    ),
    (
        r"stdio forwarding failed|open failed: (connect failed|administratively prohibited).*",
        "it does not reach {host} ({found}); check ProxyJump in ~/.ssh/config",
    ),
    (
        r"no matching .* found.*|Unable to negotiate .*",
        "it and this ssh have no method in common ({found}); update OpenSSH on it",
    ),
    (
        r"Bad owner or permissions on .*|Bad configuration option.*|terminating, \d+ bad configuration options"
        r"|Can't open user config file .*",
        "ssh does not accept its configuration ({found}); correct that file, and check it with `{ssh}`",
    ),
    (
        r"Session open refused by peer|open failed: session.*",
        "its sshd allows no session over a shared connection; set MaxSessions there to 10 (its default)",
    ),
    (
        r"[Cc]onnection (to \S+ )?(closed|reset) by (remote host|peer|\S+ port \d+).*|Broken pipe",
        "the connection was closed ({found}); check sshd's log there, or run `{ssh}`",
    ),
)
"""Patterns of what ssh prints, the most telling first, and what they mean."""

ALIVE_S = 15


def _facts(lines: Sequence[str], host: str) -> dict[str, object]:
    fingerprints = [found for line in lines if (found := _FINGERPRINT.match(line))]
    offending = [found for line in lines if (found := _OFFENDING.search(line))]
    denied = [found for line in lines if (found := _DENIED.match(line))]
    return {
        "key": f" ({fingerprints[-1].group(1)} {fingerprints[-1].group(2)})" if fingerprints else "",
        "known_hosts": f"line {offending[-1][2]} of {offending[-1][1]}"
        if offending
        else "its line of known_hosts",
        "login": denied[-1][1] if denied and any(map(_BROKEN_JUMP.search, lines)) else " ".join(_login(host)),
        "alive_s": ALIVE_S,
    }


def _login(host: str) -> list[str]:
    """`user@host:port` as arguments of ssh."""
    found = re.fullmatch(r"((?:.*@)?)(\[.*\]|[^:]*)(?::(\d+))?", host)
    if found is None:
        return [host]
    user, name, port = found.groups()
    return [*(["-p", port] if port else []), f"{user}{name.strip('[]')}"]


def explain_silence(host: str, command: Sequence[str], limit_s: float, lines: Iterable[str]) -> str:
    """Why there is no connection after the limit."""
    messages = [line for line in lines if line.strip() and not _NOISE.match(line)]
    last = f" (it printed: {messages[-1]})" if messages else ""
    ssh = shlex.join([*command, *_login(host)])
    return _cut(f"{host}: ssh has not connected within {limit_s:g} s{last}; run `{ssh}` to see what it waits for")


def explain_missing_program(program: str, error: OSError) -> str:
    """Why the ssh program does not run."""
    return _cut(
        f"cannot run {program} ({error.strerror}); install OpenSSH's client, or set SOLLOL_SSH to the ssh program"
    )


def explain_no_shell(host: str, command: Sequence[str], printed: Iterable[str]) -> str:
    """Why no POSIX shell has run a script."""
    message = " ".join(line for line in printed if not _NOISE.match(line)).strip()
    ssh = shlex.join([*command, *_login(host), "echo", "hello"])
    return _cut(
        f"{host}: this account runs no commands ({message or 'it printed nothing'}); use one with a POSIX shell, "
        f"where `{ssh}` prints hello"
    )


def explain_forwarding(host: str, reason: str) -> str:
    """Why a connection through the forwarded port failed."""
    reason = reason.partition("open failed: ")[2] or reason
    if FORBIDDEN in reason:
        return f"{host}: its sshd forbids forwarding ({reason}); set AllowTcpForwarding to local or yes there"
    return _cut(f"{host}: a connection through ssh failed ({reason})")


def _cut(text: str) -> str:
    text = "".join(character for character in " ".join(text.split()) if character.isprintable())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
