"""Which endpoints are names of one worker: by their addresses, or because it answers under one name at a time.

One worker under two names (`box:50052,192.168.1.10:50052`) would get two parts of a model, and its coordinator
would wait for itself for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence

from sollol_nb.llama_cpp.links.link import LinkedWorker
from sollol_nb.llama_cpp.processes.machine import Address, worker_at
from sollol_nb.llama_cpp.workers.probe import DEFAULT_TIMEOUT_S, answering_together
from sollol_nb.settings.endpoints import parse_endpoint


class Identities:
    """What is known of which endpoints are one worker. Lives on the I/O loop."""

    def __init__(self) -> None:
        self._address_of: dict[str, Address] = {}
        self._second_names: dict[str, str] = {}  # that only an attempt has shown
        self._lookups: dict[str, asyncio.Future[Address]] = {}

    async def resolve(self, endpoints: Iterable[str], *, again: bool = False) -> None:
        """Look up the addresses of endpoints.

        Args:
            again: also of those that are known: names and listening programs change.
        """

        loop = asyncio.get_running_loop()

        def look_up(endpoint: str) -> asyncio.Future[Address]:
            def note(lookup: asyncio.Future[Address]) -> None:
                del self._lookups[endpoint]
                if not lookup.cancelled() and lookup.exception() is None:
                    self._address_of[endpoint] = lookup.result()

            lookup = loop.run_in_executor(None, worker_at, *parse_endpoint(endpoint))
            lookup.add_done_callback(note)
            return lookup

        wanted = {endpoint for endpoint in endpoints if again or endpoint not in self._address_of}
        for endpoint in wanted - self._lookups.keys():
            self._lookups[endpoint] = look_up(endpoint)
        if wanted:
            # A slow one cannot be stopped, so nobody asks again meanwhile. Until it is known, it counts as another
            # worker.
            lookups = [self._lookups[endpoint] for endpoint in wanted]
            await asyncio.wait(lookups, timeout=DEFAULT_TIMEOUT_S)

    def of(self, endpoint: str) -> object:
        """Equal for two endpoints that are one worker, as far as is known."""
        endpoint = self._second_names.get(endpoint, endpoint)
        return self._address_of.get(endpoint, endpoint)

    def second_names(self, endpoints: Iterable[str]) -> dict[str, str]:
        """The endpoints that are another name of one before them, each with that one."""
        first: dict[object, str] = {}
        second = {}
        for endpoint in endpoints:
            known = first.setdefault(self.of(endpoint), endpoint)
            if known != endpoint:
                second[endpoint] = known
        return second

    def forget(self, endpoint: str) -> None:
        """Forget a removed endpoint, and what was a second name of it."""
        self._address_of.pop(endpoint, None)
        kept = {name: known for name, known in self._second_names.items() if endpoint not in (name, known)}
        self._second_names = kept

    async def find_second_names(self, free: Sequence[str]) -> Collection[str]:
        """Those of these free workers, given in order, that are a second name of one before them.

        Two addresses of one remote machine, or a tunnel, show only when both are used at the same time.
        """
        silent = set(free) - set(await answering_together(free)) if len(free) > 1 else set()
        found = []
        for endpoint in silent:
            # Alone it answers, if no coordinator has taken it in this moment.
            if await answering_together([endpoint]):
                before = [known for known in free[: free.index(endpoint)] if known not in silent]
                for known in before:
                    if await _exclude_each_other(known, endpoint):
                        self._second_names[endpoint] = known
                        found.append(endpoint)
                        break
        return found


def second_targets(workers: Mapping[str, Iterable[LinkedWorker]]) -> dict[str, str]:
    """The targets that lead to the same devices as one before them, each with that one.

    Args:
        workers: what each target leads to, as far as is known, in the order in which the targets were named.
    """
    first: dict[tuple[str, str], str] = {}
    second = {}
    for target, linked in workers.items():
        devices = [(worker.place, worker.device) for worker in linked if worker.place]
        earlier = next((first[device] for device in devices if device in first), None)
        if earlier is not None:
            second[target] = earlier
        else:
            first |= dict.fromkeys(devices, target)
    return second


async def _exclude_each_other(first: str, second: str) -> bool:
    """Whether of two free workers each is silent while the other is connected.

    Both ways, since another kernel may be connected to one of them at one moment.
    """
    for pair in ([first, second], [second, first]):
        if await answering_together(pair) != pair[:1]:
            return False
    return True
