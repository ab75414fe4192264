"""Workers that could be used, as `sollol-nb discover` finds them."""

from __future__ import annotations

from collections.abc import Sequence

from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.workers.discovery import FoundWorker


async def found_workers(*, ssh: Sequence[str], scan: str | None, mdns: bool) -> list[FoundWorker]:
    """The workers of the settings, of this user, of this machine's usual ports, and where else is to be looked.

    Raises:
        ConfigError: a host, a network or a setting cannot be used, or zeroconf is missing.
    """
    async with HybridRouter(gateway="local", auto_discover_rpc=False) as router:
        return await router.find_workers(ssh=ssh, scan=scan, mdns=mdns)
