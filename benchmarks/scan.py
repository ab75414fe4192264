"""How long the scan of a /24 network takes; at most 2 seconds.

    python benchmarks/scan.py [NETWORK ...] [--rounds 5]

Without networks: loopback, where each address refuses each connection, so that all usual ports of all addresses
are tried. In a real network most addresses do not react, which costs half a second once.
"""

from __future__ import annotations

import asyncio
import sys
from statistics import median

from common import Report, parser_of, run, seconds_of

from sollol_nb.llama_cpp.workers.probe import DISCOVERY_PORTS
from sollol_nb.llama_cpp.workers.scan import addresses_in, scan

LIMIT_S = 2.0
LOOPBACK_NETWORK = "127.0.0.0/24"


def main() -> Report:
    """Scan each network."""
    parser = parser_of(__doc__)
    parser.add_argument("networks", nargs="*", default=[LOOPBACK_NETWORK], metavar="NETWORK")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    report = Report()
    table = report.table("Median times of a scan", "network", "addresses", "open ports", "s")
    for network in arguments.networks:
        addresses = addresses_in(network)
        found: list[int] = []

        def look(addresses: list[str] = addresses, found: list[int] = found) -> None:
            found.append(len(asyncio.run(scan(addresses, DISCOVERY_PORTS))))

        took_s = median(seconds_of(look) for _ in range(arguments.rounds))
        table.add(network, len(addresses), found[-1], took_s)
        report.goal(f"a scan of {network} takes at most {LIMIT_S:g} s", took_s, took_s <= LIMIT_S)
    return report


if __name__ == "__main__":
    sys.exit(run(main))
