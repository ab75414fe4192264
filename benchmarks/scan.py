"""How long the scan of a /24 network takes; at most 2 seconds.

    python benchmarks/scan.py [NETWORK ...] [--rounds 5]

Without networks: loopback, where each address refuses each connection, so that all usual ports of all addresses
are tried. In a real network most addresses do not react, which costs half a second once.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from statistics import median

from sollol_nb.llama_cpp.workers.probe import DISCOVERY_PORTS
from sollol_nb.llama_cpp.workers.scan import addresses_in, scan

LIMIT_S = 2.0
LOOPBACK_NETWORK = "127.0.0.0/24"


def measure(network: str, rounds: int) -> float:
    """Scan a network several times and print a line; the median of the times in seconds."""
    addresses = addresses_in(network)
    seconds, found = [], 0
    for _ in range(rounds):
        started = time.perf_counter()
        found = len(asyncio.run(scan(addresses, DISCOVERY_PORTS)))
        seconds.append(time.perf_counter() - started)
    print(f"{network}: {len(addresses)} addresses, {found} open ports, {median(seconds):.2f} s")
    return median(seconds)


def main() -> int:
    """Scan each network; exit code 1 if one took longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=[LOOPBACK_NETWORK], metavar="NETWORK")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    slowest = max(measure(network, arguments.rounds) for network in arguments.networks)
    return 1 if slowest > LIMIT_S else 0


if __name__ == "__main__":
    sys.exit(main())
