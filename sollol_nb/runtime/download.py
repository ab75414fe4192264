"""Downloads a large file over HTTP, and resumes where an earlier attempt stopped, also one of another process.

The file is requested in pieces, so that a signed address to which the server redirects is a new one for each, and
no limit of a server for one answer counts. A server that does not know `Range` is read from the beginning.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import httpx

from sollol_nb.errors import ConnectFailedError, ConnectionBrokenError, HttpStatusError, TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE_BYTES = 2**32
"""The largest part of a file that one request asks for."""
PAUSE_S = 1.0
_TRIES = 5
"""How often in a row a request may bring nothing new."""
_CHUNK_BYTES = 2**20
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
_LOGGERS = ("httpx", "httpcore.http11")
"""They log the addresses of requests and redirects, which can be signed."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The hash in hex digits."""


def download(
    url: str,
    partial: Path,
    *,
    size_bytes: int,
    headers: Mapping[str, str],
    new_digest: Callable[[], Digest],
    advanced: Callable[[int], object],
) -> str:
    """Bring a file to its full size; returns its digest. Errors and interrupts leave what has arrived.

    Redirects are followed; a header `Authorization` goes only to the host of `url`. No address is logged.

    Args:
        partial: the file; what it has already is not requested again.
        new_digest: begins a hash of the whole file.
        advanced: called with the number of bytes that were added; a negative one if the server makes it start
            again.

    Raises:
        HttpStatusError: the server answers with an error.
        TransportError: it cannot be reached, or the connection breaks again and again.
        OSError: the file cannot be written.
    """
    digest = new_digest()
    with (
        _unlogged(),
        partial.open("ab") as file,
        httpx.Client(timeout=_TIMEOUT, follow_redirects=True) as client,
    ):
        if file.tell() > size_bytes:
            file.truncate(0)
        for chunk in _read(partial) if file.seek(0, 2) else ():
            digest.update(chunk)
        failures, furthest = 0, 0
        while (begin := file.seek(0, 2)) < size_bytes:
            try:
                end = min(begin + PIECE_BYTES, size_bytes)
                asked = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
                with client.stream("GET", url, headers=asked) as response:
                    if _is_whole(response, begin):
                        advanced(-begin)
                        file.truncate(0)
                        digest = new_digest()
                        begin, end = 0, size_bytes
                    _receive(response, file, digest, end - begin, advanced)
            except (httpx.HTTPError, httpx.InvalidURL, HttpStatusError) as error:
                is_final = isinstance(error, HttpStatusError) and error.status not in _MAY_PASS
                has_advanced = file.seek(0, 2) > furthest
                furthest = max(furthest, file.tell())
                failures = 0 if has_advanced else failures + 1
                if is_final or failures >= _TRIES:
                    raise _translated(error) from None
                time.sleep(PAUSE_S)
    return digest.hexdigest()


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """In this context, what this thread requests is not logged."""
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for name in _LOGGERS:
        logging.getLogger(name).addFilter(is_of_others)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(is_of_others)


def read_digest(path: Path, digest: Digest, advanced: Callable[[int], object]) -> str:
    """The digest of a file. `advanced` is called with the number of bytes that were read."""
    for chunk in _read(path):
        digest.update(chunk)
        advanced(len(chunk))
    return digest.hexdigest()


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _is_whole(response: httpx.Response, begin: int) -> bool:
    """Whether an answer has the whole file, and not a part that starts at `begin`.

    Raises:
        HttpStatusError: it has no part of the file.
    """
    match = _RANGE.match(response.headers.get("content-range", ""))
    if response.status_code == 206 and match is not None and int(match[1]) == begin:
        return False
    if response.status_code == 200:
        return True
    status, reason = response.status_code, response.reason_phrase or "no reason"
    if status == 206:
        status, reason = 502, "another part of the file was sent"
    raise HttpStatusError(f"the server answered {status}: {reason}", status=status, reason=reason)


def _receive(
    response: httpx.Response, file: BinaryIO, digest: Digest, most_bytes: int, advanced: Callable[[int], object]
) -> None:
    """Write an answer to a file."""
    left = most_bytes
    for chunk in response.iter_raw():
        kept = chunk[:left]
        file.write(kept)
        digest.update(kept)
        left -= len(kept)
        advanced(len(kept))
        if not left:
            return
    raise httpx.RemoteProtocolError("the answer ended too early")


def _translated(error: Exception) -> TransportError:
    """A client's error without the address, which can be a signed one."""
    if isinstance(error, TransportError):
        return error
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.InvalidURL):
        return ConnectFailedError("cannot connect")
    return ConnectionBrokenError("the connection breaks again and again")
