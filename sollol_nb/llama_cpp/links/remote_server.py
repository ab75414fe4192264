"""llama-server on another machine, of the same build as its worker program: found there, else shipped.

Only seeding (`seeding.py`) needs it, so it is not installed with the worker. A machine where that of this machine
does not run gets none.
"""

from __future__ import annotations

import asyncio
import json

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.engine import archives
from sollol_nb.llama_cpp.links import remote_facts
from sollol_nb.llama_cpp.links.remote_engine import PROBE_LIMIT_S, SCRIPT, SHIP_LIMIT_S, Preparation, RemoteEngine

_PROGRAM = "llama-server"


async def server_there(preparation: Preparation, engine: RemoteEngine) -> str:
    """The path of llama-server there.

    Args:
        engine: of that machine, as `preparation.run` has found or installed it.

    Raises:
        LinkError: it has none, and that of this machine cannot run there.
    """
    shell, own, here = preparation.shell, preparation.own, preparation.engine
    key = own.key().replace("worker-", "server-", 1)
    result = await shell.run(SCRIPT, "server", engine.worker, key, limit_s=PROBE_LIMIT_S)
    found = [line.removeprefix("server=") for line in result.stdout.splitlines() if line.startswith("server=")]
    if found:
        return found[-1]
    why = "the programs of this machine's system do not run there"
    if preparation.here is not None:
        why = remote_facts.misfit(own, preparation.here, preparation.there)
    if why:
        raise LinkError(f"{shell.host} has no llama-server, and cannot use that of this machine: {why}")
    pack = archives.packed_server(here.server)
    archive = await asyncio.to_thread(pack.__enter__)
    try:
        preparation.check_folder(2 * archive.unpacked_bytes)
        what = ("ship-server", key, archive.sha256, json.dumps({"server": own.identity}), _PROGRAM)
        outcome = await preparation.install(what, archive, SHIP_LIMIT_S)
    finally:
        await asyncio.to_thread(pack.__exit__, None, None, None)
    if not outcome.worker:
        reason = outcome.detail or "the connection was lost"
        raise LinkError(f"llama-server could not be installed on {shell.host}: {reason}")
    return outcome.worker
