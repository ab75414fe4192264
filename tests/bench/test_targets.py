"""The routers of a benchmark's targets, without engines."""

from __future__ import annotations

import asyncio

import pytest

from sollol_nb.bench.bench import bench_settings
from sollol_nb.bench.targets import BenchTargets
from sollol_nb.router.router import Router
from tests.support.engines import unused_ports

WORKERS = 8


def test_all_routers_know_the_workers_in_the_order_in_which_they_were_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exact counts are applied in this order."""
    first_port = unused_ports(WORKERS)
    found = [f"127.0.0.1:{first_port + number}" for number in reversed(range(WORKERS))]

    async def discover(router: Router) -> list[str]:
        await router.take_workers(found)
        return found

    monkeypatch.setattr(Router, "discover_workers", discover)

    async def check() -> None:
        async with Router(rpc_backends=[], auto_discover_rpc=True) as router:
            targets = BenchTargets(router, bench_settings("demo", layouts=[2, "5/4/4"]))
            await targets.prepare()
            assert len(targets.cases) == 2
            for case in targets.cases:
                assert targets._routers[case.target].worker_endpoints == found
            await targets.close()

    asyncio.run(check())
