"""Workers and coordinators of different llama.cpp are told apart before anything is started."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import EngineIncompatibleError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers.probe import Client, Probe, ProbeOutcome, probe
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, Peer, engines_of, listening, posix_only, run


def greeting(*hello: int) -> Peer:
    """A worker with a device of 1 GiB that answers HELLO with these bytes."""
    answers = {14: bytes(hello), 15: struct.pack("<I", 1), 11: struct.pack("<QQ", 2**30, 2**30)}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            command, length = struct.unpack("<BQ", await reader.readexactly(9))
            await reader.readexactly(length)
            answer = answers[command]
            writer.write(struct.pack("<Q", len(answer)) + answer)

    return serve


PROTOCOL_7_1 = greeting(7, 1, 0, *bytes(25))
PROTOCOL_6 = greeting(6, 0, 2)
ENGINE = Engine(
    server=Path("/llama/llama-server"), worker=Path("/llama/rpc-server"), version="0.5.0", source="PATH"
)


@pytest.mark.parametrize(
    ("peer", "protocol", "outcome", "detail"),
    [
        (PROTOCOL_7_1, "7.1.0", ProbeOutcome.FREE, "free"),
        (PROTOCOL_7_1, "7.2.5", ProbeOutcome.FREE, "free"),
        (
            PROTOCOL_7_1,
            "7.0.0",
            ProbeOutcome.INCOMPATIBLE,
            "{} speaks RPC protocol 7.1.0 of a newer llama.cpp, but llama.cpp 0.5.0 here speaks 7.0; run "
            "`sollol-nb install` there, or use one llama.cpp build everywhere",
        ),
        (
            PROTOCOL_6,
            "7.1.0",
            ProbeOutcome.INCOMPATIBLE,
            "{} speaks RPC protocol 6.0.2 of an older llama.cpp, but llama.cpp 0.5.0 here speaks 7.1; run "
            "`sollol-nb install` there, or use one llama.cpp build everywhere",
        ),
    ],
)
def test_the_engine_that_is_used_here_decides_which_workers_are_compatible(
    peer: Peer, protocol: str, outcome: ProbeOutcome, detail: str
) -> None:
    async def check() -> Probe:
        async with listening(peer) as port:
            return await probe("127.0.0.1", port, client=Client.of(replace(ENGINE, protocol=protocol)))

    found = run(check())
    assert (found.outcome, found.detail) == (outcome, detail.format(found.endpoint))


def test_an_engine_whose_protocol_is_not_known_is_taken_for_one_of_ours() -> None:
    assert Client.of(ENGINE) == Client("0.5.0", 0)


@posix_only
@pytest.mark.engine
def test_an_engine_of_another_protocol_here_is_named_before_anything_is_started(
    engine: Engine, tmp_path: Path, alone: None
) -> None:
    for program, said in ((engine.server, ""), (engine.worker, "echo 'Starting RPC server v6.0.0'")):
        wrapper = tmp_path / program.name
        wrapper.write_text(f'#!/bin/sh\n{said}\nexec "{program}" "$@"\n')
        wrapper.chmod(0o755)
    before = engines_of(psutil.Process())
    with HybridRouter(llama_cpp=tmp_path, auto_setup_rpc=True) as mine:
        with pytest.raises(EngineIncompatibleError) as failure:
            mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        assert str(failure.value) == (
            f"llama.cpp {engine.version} in {tmp_path} (found in: given folder) speaks RPC protocol 6.0.0, but "
            "only workers of RPC protocol 7 can be used; run `sollol-nb install` here to build a llama.cpp that "
            "fits"
        )
    # Those of other tests may have ended meanwhile.
    assert [process for process in engines_of(psutil.Process()) if process not in before] == []
