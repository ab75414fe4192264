"""Run the benchmarks, and render what they measured as `benchmarks/RESULTS.md`; `make bench` does it.

    python benchmarks/run_all.py [NAME ...]

Without names: all of them. A script that fails or takes too long is named in the file, and makes the exit code 1.
What scripts that are not named measured before is kept, as far as `benchmarks/results/` has it.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from render import FOLDER, HEADINGS, RESULTS, rendered

LIMIT_S = 600.0  # of one script; all together take under 25 minutes on two cores
ENDING_LIMIT_S = 30.0


def main() -> int:
    """Run them one after the other; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as sharding")
    names = parser.parse_args().names or list(HEADINGS)
    for name in names:
        if name not in HEADINGS:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(HEADINGS)}")
    FOLDER.mkdir(exist_ok=True)
    began = time.monotonic()
    failed = [name for name in names if not is_done(name)]
    RESULTS.write_text(rendered(FOLDER, failed), encoding="utf-8")
    took_s = time.monotonic() - began
    print(f"{len(names) - len(failed)} of {len(names)} benchmarks in {took_s:.0f} s: see {RESULTS.name}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def is_done(name: str) -> bool:
    """Run one; whether it ended well, and in time."""
    print(f"== {name}", flush=True)
    found = FOLDER / f"{name}.json"
    found.unlink(missing_ok=True)
    script = Path(__file__).with_name(f"{name}.py")
    with subprocess.Popen([sys.executable, str(script), "--json", str(found)]) as process:
        try:
            return process.wait(LIMIT_S) == 0 and found.is_file()
        except subprocess.TimeoutExpired:
            print(f"{name} did not end within {LIMIT_S:g} s", file=sys.stderr)
            process.send_signal(signal.SIGINT)  # it ends its engines
            try:
                process.wait(ENDING_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return False


if __name__ == "__main__":
    sys.exit(main())
