"""The long run: `python -m tests.chaos --n 200 --seed 1`, or `make chaos N=200`.

Prints, for each kind of fault, in how many trials every answer was the undisturbed one, and how long the reader
waited for the next token. A failed trial is printed with the line that repeats it. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from sollol_nb.llama_cpp.coordinators import readiness
from sollol_nb.llama_cpp.engine.find import find_engine
from tests.chaos.machines import Cluster
from tests.chaos.trials import STALL_S, TRIALS, Chaos
from tests.support.engines import eventually, with_variable


@dataclass
class Tally:
    """The results of one kind of fault.

    Attributes:
        silences_s: for each answer that a fault has struck, the time until its next token.
    """

    tried: int = 0
    survived: int = 0
    silences_s: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        """A line of the table."""
        median_s, longest_s = (
            (f"{statistics.median(self.silences_s):.2f} s", f"{max(self.silences_s):.2f} s")
            if self.silences_s
            else ("", "")
        )
        return f"{name:<22} {self.survived:>4} / {self.tried:<4} {median_s:>10} {longest_s:>10}"


def main() -> int:
    """Run trials; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Break answers, and compare them.")
    parser.add_argument("--n", type=int, default=50, help="number of trials (default: 50)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="seed of the first trial; each next trial adds 1"
    )
    parser.add_argument("--only", choices=TRIALS, help="only this kind of fault, instead of all in turn")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the machines are ended too
    names = [arguments.only] if arguments.only else list(TRIALS)
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    with tempfile.TemporaryDirectory(prefix="chaos-") as state:
        os.environ |= {"SOLLOL_STATE_DIR": state, "OLLAMA_HOST": "127.0.0.1:9"}
        readiness.LOAD_STALL_S = STALL_S
        with Cluster(find_engine()) as cluster:
            tallies = break_answers(Chaos(cluster), names, seeds)
        eventually(lambda: not with_variable("SOLLOL_STATE_DIR", state), "no process is left")
    print(f"\n{'fault':<22} {'survived':>11} {'next token':>10} {'longest':>10}")
    everything = Tally(
        sum(tally.tried for tally in tallies.values()),
        sum(tally.survived for tally in tallies.values()),
        [silence_s for tally in tallies.values() for silence_s in tally.silences_s],
    )
    for name, tally in [*tallies.items(), ("all", everything)]:
        print(tally.row(name))
    return int(any(tally.survived < tally.tried for tally in tallies.values()))


def break_answers(chaos: Chaos, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Tally]:
    """Run one trial for each seed. The seed determines which one, so that a seed is enough to repeat it."""
    tallies = {name: Tally() for name in names}
    for number, seed in enumerate(seeds, 1):
        name = names[seed % len(names)]
        tally = tallies[name]
        tally.tried += 1
        try:
            answers = TRIALS[name](chaos, random.Random(f"{name} {seed}"))
            differences = chaos.differences(answers)
        except Exception:
            answers, differences = [], [traceback.format_exc(), *map(repr, chaos.cluster.machines)]
        silences_s = [answer.silence_s for answer in answers if answer.silence_s is not None]
        tally.silences_s += silences_s
        tally.survived += not differences
        result = f"next token after {max(silences_s, default=0):.2f} s" if not differences else "FAILED"
        print(f"{number}/{len(seeds)} {name}: {result}", flush=True)
        if differences:
            print(f"  repeat with: python -m tests.chaos --n 1 --seed {seed} --only {name!r}")
            print(*differences, sep="\n  ", flush=True)
    return tallies


if __name__ == "__main__":
    sys.exit(main())
