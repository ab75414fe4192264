"""The long run: `python -m tests.chaos --n 200 --seed 1`, or `make chaos N=200`.

Prints, for each kind of fault, how many answers were identical to the undisturbed one, how many finished with
another text after the fault, and how many were lost; and how long the reader waited for the next token. Answers of
the demo model, and those of a real model (`--model smollm2`) with `--recovery exact`, must be identical; with
`--recovery fast` those of a real model need only finish. A failed trial is printed with the line that repeats it.
Exit code 1 if any failed.
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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sollol_nb.chat.option_checks import RECOVERIES
from sollol_nb.llama_cpp.coordinators import readiness
from sollol_nb.llama_cpp.engine.find import find_engine
from tests.chaos.machines import Cluster
from tests.chaos.trials import ALL_SLOTS_BUSY, OUTCOMES, STALL_S, TRIALS, Chaos, demo, smollm2
from tests.support.engines import eventually, with_variable


@dataclass
class Tally:
    """The results of one kind of fault.

    Attributes:
        outcomes: how many answers had each of `OUTCOMES`; all of a trial that raised an error count as one lost.
        failed: trials that did not hold what they must.
        silences_s: for each answer that a fault has struck, the time until its next token.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    silences_s: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the results of another kind."""
        self.outcomes += other.outcomes
        self.failed += other.failed
        self.silences_s += other.silences_s

    def row(self, name: str) -> str:
        """A line of the table."""
        median_s, longest_s = (
            (f"{statistics.median(self.silences_s):.2f} s", f"{max(self.silences_s):.2f} s")
            if self.silences_s
            else ("", "")
        )
        counts = "".join(f"{self.outcomes[outcome]:>11}" for outcome in OUTCOMES)
        return f"{name:<22}{counts} {median_s:>10} {longest_s:>10}"


def main() -> int:
    """Run trials; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Break answers, and compare them.")
    parser.add_argument("--n", type=int, default=50, help="number of trials (default: 50)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="seed of the first trial; each next trial adds 1"
    )
    parser.add_argument("--only", choices=TRIALS, help="only this kind of fault, instead of all in turn")
    parser.add_argument(
        "--model", choices=("demo", "smollm2"), default="demo", help="what is asked (default: demo)"
    )
    parser.add_argument("--recovery", choices=RECOVERIES, default="fast", help="how it recovers (default: fast)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the machines are ended too
    is_exact = arguments.recovery == "exact"
    if arguments.model == "demo":
        subject, trials = demo(recovery=arguments.recovery), list(TRIALS)
    else:  # the answers of a real model depend on those beside them
        subject = smollm2(**({"deterministic": True} if is_exact else {}))
        trials = [name for name in TRIALS if name != ALL_SLOTS_BUSY]
    names = [arguments.only] if arguments.only else trials
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    repeat = f"--model {arguments.model} --recovery {arguments.recovery}"
    with tempfile.TemporaryDirectory(prefix="chaos-") as state:
        os.environ |= {"SOLLOL_STATE_DIR": state, "OLLAMA_HOST": "127.0.0.1:9"}
        readiness.LOAD_STALL_S = STALL_S
        with Cluster(find_engine()) as cluster:
            tallies = break_answers(Chaos(cluster, subject), names, seeds, repeat)
        eventually(lambda: not with_variable("SOLLOL_STATE_DIR", state), "no process is left")
    print(f"\n{'fault':<22}{''.join(f'{outcome:>11}' for outcome in OUTCOMES)} {'next token':>10} {'longest':>10}")
    everything = Tally()
    for name, tally in tallies.items():
        print(tally.row(name))
        everything.add(tally)
    print(everything.row("all"))
    return int(everything.failed > 0)


def break_answers(chaos: Chaos, names: Sequence[str], seeds: Sequence[int], repeat: str) -> dict[str, Tally]:
    """Run one trial for each seed. The seed determines which one, so that a seed is enough to repeat it."""
    tallies = {name: Tally() for name in names}
    for number, seed in enumerate(seeds, 1):
        name = names[seed % len(names)]
        tally = tallies[name]
        try:
            answers = TRIALS[name](chaos, random.Random(f"{name} {seed}"))
            problems = chaos.problems(answers)
            outcomes = Counter(map(chaos.outcome, answers))
        except Exception:
            answers, problems = [], [traceback.format_exc(), *map(repr, chaos.cluster.machines)]
            outcomes = Counter(lost=1)
        silences_s = [answer.silence_s for answer in answers if answer.silence_s is not None]
        tally.silences_s += silences_s
        tally.outcomes += outcomes
        tally.failed += bool(problems)
        shown = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        result = f"{shown}, next token after {max(silences_s, default=0):.2f} s" if not problems else "FAILED"
        print(f"{number}/{len(seeds)} {name}: {result}", flush=True)
        if problems:
            print(f"  repeat with: python -m tests.chaos --n 1 --seed {seed} --only {name!r} {repeat}")
            print(*problems, sep="\n  ", flush=True)
    return tallies


if __name__ == "__main__":
    sys.exit(main())
