"""How fast workers are, as measured with a small generated model: kept in a file, and corrected by real answers.

A calibration belongs to a worker's identity, not to a port that changes: for a worker that is reached through a
link its target and name, for others the endpoint (on loopback with the name of this machine), and to one build of
llama.cpp. It is measured by `coordinators/calibrator.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError
from sollol_nb.layers.plan import THIS_MACHINE, is_own
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.runtime.private_files import read_private, write_private
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import is_loopback

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

CALIBRATIONS_KEPT = 200
CORRECTION_WEIGHT = 0.25
"""How far a measured answer moves a calibration: answers vary with what else a machine does, and with the
model."""
CHECK_EVERY_S = 1.0
_FILE = "calibrations.json"
_LIMITS = {"round_trip_ms": 1e6, "bytes_per_s": 1e15, "hop_ms": 1e6, "block_ms": 1e6, "ms_per_byte": 1.0}
_LIMITS |= {"weight_share": 1.0, "context_ms_per_byte": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How fast one worker is. A token takes it

        round trip + hop_ms + blocks * block_ms + bytes of weights * ms_per_byte

    Attributes:
        identity: what it belongs to; see the module.
        engine: the build of llama.cpp that measured, as `llama-server --version` prints it.
        endpoint: where it was measured, or `THIS_MACHINE`.
        name: how people call the worker.
        measured_at: seconds since the epoch.
        round_trip_ms: of the network; None for this machine.
        bytes_per_s: of weights on the way to the worker; None where they are not sent.
        hop_ms: what the engine spends in addition for each token and worker; for this machine, for each token.
        block_ms: what it spends for each block, whatever its size.
        ms_per_byte: of weights in Q4_K, for each generated token.
        prompt_ms_per_byte: of weights, for each token of a prompt.
        threads: of the CPU, for a worker that was started here; None for others.
        weight_share: of `ms_per_byte`, what depends on how many weights a byte holds: 1 for a processor that
            computes all the time, 0 for one that waits for its memory.
        context_ms_per_byte: of K and V of the tokens before, for each generated token, where no heads share them.
        corrections: how often answers to requests have corrected `ms_per_byte` since the measurement.
    """

    identity: str
    engine: str
    endpoint: str
    name: str
    measured_at: float
    round_trip_ms: float | None
    bytes_per_s: float | None
    hop_ms: float
    block_ms: float
    ms_per_byte: float
    prompt_ms_per_byte: float
    threads: int | None = None
    corrections: int = 0
    weight_share: float = 0.0
    context_ms_per_byte: float = 0.0

    def describe(self) -> str:
        """`0.31 ms round trip, 940 MB/s, 8.2 GB/s tokens, 95 GB/s prompts`."""
        known = [] if self.round_trip_ms is None else [f"{self.round_trip_ms:.2g} ms round trip"]
        known += [] if self.bytes_per_s is None else [_format_rate(self.bytes_per_s)]
        known += [f"{_format_rate(1000 / self.ms_per_byte)} tokens"] if self.ms_per_byte else []
        known += [f"{_format_rate(1000 / self.prompt_ms_per_byte)} prompts"] if self.prompt_ms_per_byte else []
        return ", ".join(known)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration of an `asdict`; keys of newer versions are ignored.

        Raises:
            TypeError, ValueError: a value is missing, or of another type or size.
        """
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        found = cls(**known)
        texts = (found.identity, found.engine, found.endpoint, found.name)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is missing")
        for name in ("measured_at", *_LIMITS, "prompt_ms_per_byte", "threads", "corrections"):
            value = getattr(found, name)
            if value is None and name in ("round_trip_ms", "bytes_per_s", "threads"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(name)
            if not (math.isfinite(value) and 0 <= value <= _LIMITS.get(name, math.inf)):
                raise ValueError(name)
        return found


def _format_rate(bytes_per_s: float) -> str:
    """`940 MB/s`, `8.2 GB/s`: powers of ten, as networks are named."""
    for unit, size in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_s >= 0.9995 * size:
            rate = bytes_per_s / size
            return f"{rate:.0f} {unit}" if rate >= 99.5 else f"{rate:.2g} {unit}"
    return f"{bytes_per_s / 1e3:.2g} kB/s"


def identity_of(endpoint: str, *, target: str | None = None, name: str = "") -> str:
    """What a worker's calibration belongs to.

    Args:
        endpoint: the worker, `THIS_MACHINE`, or what stands for one of its GPUs.
        target, name: of the link through which it is reached, and its name there.
    """
    if target is not None:
        return f"{target} {name}"
    is_here = is_own(endpoint) or is_loopback(endpoint)
    return f"{platform.node()} {endpoint}" if is_here else endpoint


def calibrations_frame(calibrations: Iterable[Calibration]) -> pd.DataFrame:
    """Calibrations as a frame, a row each; its columns are the attributes of `Calibration`, with times as UTC."""
    import pandas as pd

    dtypes = {
        **dict.fromkeys(("name", "endpoint", "identity", "engine"), "string"),
        **dict.fromkeys(("round_trip_ms", "bytes_per_s", "hop_ms", "block_ms"), "Float64"),
        **dict.fromkeys(("ms_per_byte", "prompt_ms_per_byte", "measured_at"), "Float64"),
        **dict.fromkeys(("weight_share", "context_ms_per_byte"), "Float64"),
        **dict.fromkeys(("threads", "corrections"), "Int64"),
    }
    rows = [[getattr(calibration, name) for name in dtypes] for calibration in calibrations]
    frame = pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes)
    return frame.assign(measured_at=pd.to_datetime(frame["measured_at"], unit="s", utc=True))


class Calibrations:
    """The calibrations of this user, in a file that all kernels share.

    Attributes:
        engine: the build that is used now; calibrations of others count only while it is not known ("").
    """

    def __init__(self) -> None:
        self.engine = ""
        self._known: dict[tuple[str, str], Calibration] = {}
        self._seen: tuple[str, int, int] | None = None
        self._checked_at = -math.inf

    @property
    def all(self) -> list[Calibration]:
        """All that are kept, the oldest first."""
        self._read(now=True)
        return sorted(self._known.values(), key=lambda calibration: calibration.measured_at)

    def of(self, identity: str, *, threads: int | None = None) -> Calibration | None:
        """The calibration of a worker, as measured with the build that is used; None if there is none.

        Args:
            threads: of a worker that was started here: the calibration of another one here with as many threads
                counts for it, and that of an earlier one at its endpoint with other threads does not.
        """
        self._read()
        known = [calibration for calibration in self._known.values() if self.engine in ("", calibration.engine)]
        if threads is not None:
            here = identity_of(THIS_MACHINE).removesuffix(THIS_MACHINE)
            known = [
                calibration
                for calibration in known
                if calibration.identity.startswith(here) and calibration.threads == threads
            ]
            known = [calibration for calibration in known if calibration.identity == identity] or known
        else:
            known = [calibration for calibration in known if calibration.identity == identity]
        return max(known, key=lambda calibration: calibration.measured_at, default=None)

    async def keep(self, calibrations: Iterable[Calibration]) -> None:
        """Keep calibrations, in place of earlier ones of the same workers and build.

        Raises:
            WorkersUnavailableError: another process has locked the file for a minute.
            ConfigError: the file cannot be written.
        """
        new = {(calibration.identity, calibration.engine): calibration for calibration in calibrations}
        async with registry.locked("calibrations", "writing calibrations"):
            await asyncio.to_thread(self._write, new)

    async def correct(self, factors: Mapping[str, float]) -> None:
        """Bring calibrations nearer to what answers have shown.

        Args:
            factors: by identity: measured time for each byte of weights, relative to the calibration.
        """
        found = {identity: self.of(identity) for identity in factors}
        corrected = [
            replace(
                known,
                ms_per_byte=min(known.ms_per_byte * factors[identity] ** CORRECTION_WEIGHT, 1.0),
                corrections=known.corrections + 1,
            )
            for identity, known in found.items()
            if known is not None
        ]
        if corrected:
            await self.keep(corrected)

    def _write(self, new: Mapping[tuple[str, str], Calibration]) -> None:
        self._read(now=True)
        newest = sorted({**self._known, **new}.values(), key=lambda calibration: calibration.measured_at)
        text = json.dumps([asdict(calibration) for calibration in newest[-CALIBRATIONS_KEPT:]], indent=1)
        path = config.state_file(_FILE)
        try:
            write_private(path, text)
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror or error}); free some space") from error
        self._read(now=True)

    def _read(self, *, now: bool = False) -> None:
        """Read the file, if it has changed; without `now`, at most once a second."""
        if not now and time.monotonic() - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = time.monotonic()
        try:
            path = config.state_file(_FILE)
            found = path.stat()
        except FileNotFoundError:
            self._known, self._seen = {}, None
            return
        except (OSError, ConfigError) as error:
            logger.warning("the calibrations of workers cannot be read: %s", error)
            return
        seen = (str(path), found.st_mtime_ns, found.st_ino)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            kept = [Calibration.from_dict(data) for data in json.loads(read_private(path) or "")]
            self._known = {(calibration.identity, calibration.engine): calibration for calibration in kept}
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._known = {}
            logger.warning("%s is damaged and is ignored; `sollol-nb calibrate` writes it again", path)
