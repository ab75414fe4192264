"""What a failed download means, and what to do, as one line. Addresses and texts of servers are not shown."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sollol_nb.errors import ConnectFailedError, HttpStatusError, TransportError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOGIN = "give a token of your account in HF_TOKEN, or log in with `hf auth login`"


@dataclass(frozen=True, slots=True)
class Place:
    """What is downloaded, and to where.

    Attributes:
        repository: `user/repo`.
        endpoint: the Hub or its mirror, as a URL without a password.
        cache: the folder of the files.
    """

    repository: str
    endpoint: str
    cache: Path

    def __str__(self) -> str:
        return f"hf.co/{self.repository}"


def of_client(error: Exception, known: Any, place: Place) -> str:
    """For an error of the client.

    Args:
        known: the client's module `errors`.
    """
    if isinstance(error, known.GatedRepoError):
        return f"{place} is gated: accept its conditions on {place.endpoint}/{place.repository}, and {_LOGIN}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, known.RepositoryNotFoundError) or status == 401:  # the Hub does not say which of these
        return f"{place} does not exist, is private, or your token is not valid; check the name, and {_LOGIN}"
    if isinstance(error, known.OfflineModeIsEnabled):
        return f"cannot pull {place}: HF_HUB_OFFLINE is set; remove it"
    if isinstance(error, known.HFValidationError):
        return f"{place} is not a repository of the Hugging Face Hub; use hf.co/user/repo:quant"
    if status is not None:
        return _of_status(int(status), place)
    if isinstance(error, OSError) and error.errno in (*_FULL, *_REFUSED):
        return of_disk(error, place)
    return _unreachable(type(error).__name__, place)


def of_transfer(error: TransportError, file: str, place: Place) -> str:
    """For an error while a file arrives."""
    if isinstance(error, HttpStatusError):
        return _of_status(error.status, place)
    if isinstance(error, ConnectFailedError):
        return _unreachable("no connection", place)
    name = PurePosixPath(file).name
    return f"the download of {name} stopped: {error}; what has arrived is kept, run the same command again"


def of_disk(error: OSError, place: Place) -> str:
    """For an error of the disk."""
    if error.errno in _FULL:
        return (
            f"the disk of {place.cache} is full; free some of it, or set HF_HOME to a folder on another disk, and "
            "run the same command again"
        )
    return f"cannot write to {place.cache}: {error.strerror or type(error).__name__}; check its permissions"


def _of_status(status: int, place: Place) -> str:
    if status in (401, 403):
        return f"{place.endpoint} refuses {place} ({status}); check your token, or {_LOGIN}"
    if status == 404:
        return f"{place.endpoint} does not have {place} or this file of it any more; run the same command again"
    if status == 429:
        return f"{place.endpoint} has had too many requests from here; wait a few minutes, or {_LOGIN}"
    return f"{place.endpoint} answered {status} for {place}; try again later"


def _unreachable(reason: str, place: Place) -> str:
    return f"cannot reach {place.endpoint} ({reason}); check the network, or name a mirror in HF_ENDPOINT"
