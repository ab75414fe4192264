"""Benchmarks: each figure of the README is one of theirs, a failure is named, and the simulation is right."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
FIGURE = re.compile(r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?) ?(?:ms|us|s|MB|GB|kB|%|x|times|tokens/s)(?![\w/])")


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the folder are found as when one of them runs."""
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_each_figure_of_what_it_costs_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## What it costs\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    results = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    invented = [figure for figure in FIGURE.findall(section) if not re.search(rf"(?<![\d.,]){figure}\b", results)]
    assert not invented, f"not in benchmarks/RESULTS.md: {invented}"


def test_each_benchmark_is_run_and_named_in_the_readme() -> None:
    scripts = {file.stem for file in FOLDER.glob("*.py") if file.read_text().endswith("sys.exit(run(main))\n")}
    assert set(module("render").HEADINGS) == scripts
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in sorted(scripts) if f"{name}.py" not in readme] == []


def test_results_show_tables_goals_and_what_failed(tmp_path: Path) -> None:
    common, render = module("common"), module("render")
    report = common.Report(notes=["On loopback."])
    report.table("Medians", "way", "tokens/s", "ratio").add("ours", 1234.5, 0.987)
    report.goal("at least 0.9", 0.987, True)
    about = {"processor": "P", "cores": 2, "system": "Linux", "python": "3", "engine": "e", "date": "2026-01-31"}
    data = {"tables": [vars(table) for table in report.tables], "goals": report.goals, "notes": report.notes}
    (tmp_path / "scale.json").write_text(json.dumps(data | {"failed": "", "took_s": 7, "machine": about}))
    text = render.rendered(tmp_path, ["start"])
    assert "**Failed: `start.py`.**" in text
    assert "Measured on 2 cores (P), Linux, Python 3, llama.cpp e." in text
    assert "| ours | 1,234 | 0.99 |" in text
    assert "| at least 0.9 | 0.99 | met |" in text
    assert "`benchmarks/scale.py`, 2026-01-31, 7 s" in text


def test_at_one_node_every_policy_serves_in_order_of_arrival() -> None:
    queueing = module("queueing")
    found = [queueing.simulated(policy, 1, 0.9, 500, seed=7) for policy in queueing.POLICIES.values()]
    assert found[1:] == [pytest.approx(found[0])] * (len(found) - 1)


@pytest.mark.parametrize("load", [0.5, 0.95])
def test_no_answer_is_faster_than_the_fastest_node_and_none_is_lost(load: float) -> None:
    queueing = module("queueing")
    for policy in queueing.POLICIES.values():
        times_s = queueing.simulated(policy, 20, load, 1000, seed=3)
        assert len(times_s) == 800
        assert min(times_s) >= queueing.SHORTEST * queueing.MS_PER_TOKEN[0] / 1000 - 1e-9
