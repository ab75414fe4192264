"""Write `benchmarks/RESULTS.md` from what the benchmarks measured: the JSON files in `benchmarks/results/`.

    python benchmarks/render.py

`run_all.py` runs the benchmarks, and then this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common import Report

FOLDER = Path(__file__).with_name("results")
RESULTS = Path(__file__).with_name("RESULTS.md")

HEADINGS = {
    "overhead": "What the router adds to a request",
    "batch": "A batch of prompts",
    "prefix": "A batch with a common instruction",
    "gateway": "What the gateway adds to a request",
    "plan": "Layer plans on uneven clusters",
    "calibration": "Predicted token times",
    "speculation": "Speculation",
    "sharding": "Local, and over one to three workers",
    "links": "Ways to a worker",
    "start": "Until a model is ready",
    "failover": "From a worker's death to the next token",
    "scale": "Choosing among many",
    "cluster_state": "Watching a hundred workers",
    "latency_log": "The latency log",
    "scan": "Scanning a network",
    "import_cost": "Loading the extension",
}
"""The benchmarks in the order of the file, and their headings."""


def rendered(folder: Path, failed: Sequence[str] = ()) -> str:
    """The file's text.

    Args:
        folder: of the JSON files.
        failed: the benchmarks that have just failed.
    """
    lines = [
        "# Results of the benchmarks",
        "Written by `make bench`; do not edit. Every benchmark runs its peer in the same run, in turns, so the "
        "ratios hold on other machines better than the times do.",
    ]
    if failed:
        lines.append(f"**Failed: {', '.join(f'`{name}.py`' for name in failed)}.**")
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in HEADINGS
        if (path := folder / f"{name}.json").is_file()
    }
    machines = []
    for data in found.values():
        about = dict(data["machine"])
        date, cores = about.pop("date"), about["cores"]
        machines.append(
            f"{cores} cores ({about['processor']}), {about['system']}, Python {about['python']}, "
            f"llama.cpp {about['engine']}"
        )
        data["measured"] = f"`benchmarks/{{name}}.py`, {date}, {data['took_s']:.0f} s"
    usual = max(machines, key=machines.count, default="")
    if usual:
        lines.append(f"Measured on {usual}.")
    for (name, data), machine in zip(found.items(), machines, strict=True):
        where = "" if machine == usual else f", on {machine}"
        lines += [
            f"## {HEADINGS[name]}",
            data["measured"].format(name=name) + where,
            Report.from_json(data).as_markdown(),
        ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    RESULTS.write_text(rendered(FOLDER), encoding="utf-8")
