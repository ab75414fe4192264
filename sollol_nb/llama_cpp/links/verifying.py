"""Before a load: the caches of weights on the other side of a link are verified there.

The process that starts a coordinator writes a request into the registry entry of the link; the link's process sees
it there, lets the other side verify the caches, and writes into the entry that it is done.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence

from sollol_nb.llama_cpp.links.program import Report
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.weights import cache

VERIFY_LIMIT_S = 30.0
"""For the other side: it flushes what was written since the last load to its disk."""
START_LIMIT_S = VERIFY_LIMIT_S + 5.0
ANSWER_POLL_S = 0.05
REQUEST_POLL_S = 0.2
VERIFIES = "verifies"
"""Key in the registry entry of a link that answers requests."""

Verify = Callable[[Collection[str], Sequence[int]], Awaitable[bool]]
"""Whether the caches of these endpoints' workers have only complete files; sizes of such files."""

_VERIFIED = re.compile(r"verified (\d{1,9})", re.ASCII)


async def verify(entry: Entry, endpoints: Collection[str], sizes: Collection[int]) -> bool:
    """Whether the workers behind a link may load a model: they have no caches, or these were verified now.

    Args:
        entry: of the link.
        endpoints: of the workers, which are idle.
        sizes: of the model's tensors that are cached.
    """
    if not entry.about.get(VERIFIES):  # an older version, whose workers have no caches
        return True
    link = await EngineProcess.adopt(entry)
    if link is None:
        return False
    number = secrets.token_hex(8)
    try:
        await link.update_about(verify={"number": number, "endpoints": [*endpoints], "sizes": sorted(sizes)})
        async with asyncio.timeout(START_LIMIT_S):
            while True:
                now = await asyncio.to_thread(registry.find, entry.id)
                if now is None or now.about.get("refused") == number:
                    return False
                if now.about.get("verified") == number:
                    return True
                await asyncio.sleep(ANSWER_POLL_S)
    except TimeoutError:
        return False
    finally:
        link.detach()


async def answer_requests(report: Report, verify: Verify) -> None:
    """In the process of a link: carry out the requests in its registry entry, until cancelled. Before it reports a
    worker, it must have told that it `VERIFIES`."""
    last = None
    while True:
        asked = (await report.about()).get("verify")
        if isinstance(asked, dict) and (number := asked.get("number")) != last:
            last = number
            is_verified = await verify(asked["endpoints"], asked["sizes"])
            await report.tell(**{"verified" if is_verified else "refused": number})
        await asyncio.sleep(REQUEST_POLL_S)


class AgentVerifying:
    """What an agent (`agent.sh`) is asked.

    Args:
        send: gives it a line.
        devices: the endpoint of each of its workers, in its order.
    """

    def __init__(self, send: Callable[[str], None], devices: Callable[[], Sequence[str]]) -> None:
        self._send = send
        self._devices = devices
        self._count = 0
        self._answers: dict[int, asyncio.Event] = {}

    async def verify(self, endpoints: Collection[str], sizes: Sequence[int]) -> bool:
        """See `Verify`."""
        devices = [str(index) for index, endpoint in enumerate(self._devices()) if endpoint in endpoints]
        known = await asyncio.to_thread(cache.known_sizes)
        self._count += 1
        number = self._count
        self._answers[number] = event = asyncio.Event()
        try:
            self._send(f"sizes {' '.join(map(str, sorted({*known, *sizes})))}\n")
            self._send(f"verify {number} {' '.join(devices)}\n")
            async with asyncio.timeout(VERIFY_LIMIT_S):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            del self._answers[number]
        return True

    def heard(self, line: str) -> bool:
        """Whether a line of the agent is an answer."""
        found = _VERIFIED.fullmatch(line)
        if found and (event := self._answers.get(int(found[1]))) is not None:
            event.set()
        return found is not None
