"""A calibration of this machine, so that tests measure only workers."""

from __future__ import annotations

from sollol_nb.layers.plan import THIS_MACHINE
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.calibrations import Calibration, Calibrations, identity_of
from tests.support.engines import run


def know_this_machine(engine: Engine) -> None:
    """Keep a calibration of this machine in the state folder."""
    calibration = Calibration(
        identity=identity_of(THIS_MACHINE),
        engine=engine.version,
        endpoint=THIS_MACHINE,
        name=THIS_MACHINE,
        measured_at=1.0,
        round_trip_ms=None,
        bytes_per_s=None,
        hop_ms=0.04,
        block_ms=0.0,
        ms_per_byte=1e-7,
        prompt_ms_per_byte=1e-8,
    )
    run(Calibrations().keep([calibration]))
