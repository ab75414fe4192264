"""Take the pictures of the README and of the notebooks: in a real JupyterLab, of what really ran.

    python tools/pictures.py                    # all of them
    python tools/pictures.py survival 01 05     # the README's, and those of two notebooks

A notebook's picture shows the cells that have the tag `picture`, from the first to the last. The README's shows an
answer of a real model over three workers, one of which this script kills in the middle of the answer.

Needs the `dev` extra, llama.cpp (`sollol-nb install`), a Chromium, and for some notebooks sshd and an Ollama.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Literal

import nbformat
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from sollol_nb.llama_cpp.processes.running import running_engines, stop_engines
from sollol_nb.runtime.io_loop import run_blocking
from tests.lab.lab import NO_CHROMIUM, HeadlessLab, find_chromium, headless_lab
from tests.lab.page import CELLS, LabPage
from tests.support.ollama_server import OllamaServer, find_ollama
from tests.support.smollm2 import smollm2_path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PICTURES = ROOT / "notebooks" / "images"
SURVIVAL = "survival"
TAG = "picture"

WIDTH, HEIGHT = 1000, 9000  # of the page, in CSS pixels: every cell is in view
SCALE = 2  # pixels of the picture for one of the page, for sharp text
COLORS = 128

MODEL = "smollm2"
SETUP = f"""%load_ext sollol_nb
%config Sollol.speculation = "off"
%sollol_cluster start 3
from sollol_nb.hybrid_router import MODEL_PROFILES
MODEL_PROFILES["{MODEL}"] = {{"requires_distributed": True}}"""  # it would fit on one machine
ASK = f"""%%sollol {MODEL} --temperature 0 --max-tokens 200 --out answer
Why do teams work better than single people? Answer in two paragraphs."""
BEFORE_THE_KILL_CHARS = 180
FIGURE = """<style>
body {{ margin: 0; padding: 12px; background: #fff; color: #1f2328; font: 600 15px system-ui, sans-serif; }}
figure {{ margin: 0 0 14px; border: 1px solid #d0d7de; border-radius: 8px; overflow: hidden; }}
figure:last-child {{ margin: 0 }}
figcaption {{ padding: 8px 14px; background: #f6f8fa; border-bottom: 1px solid #d0d7de; }}
img {{ display: block; width: 100%; padding: 4px 0; }}
</style>{figures}"""


def crop(page: LabPage, first: int, last: int, path: Path) -> None:
    """Save a picture of some cells."""
    top, bottom = page.cell(first).bounding_box(), page.cell(last).bounding_box()
    assert top is not None
    assert bottom is not None
    clip = {"x": top["x"], "y": top["y"], "width": top["width"]}
    clip["height"] = bottom["y"] + bottom["height"] - clip["y"]
    page.page.screenshot(path=path, clip=clip)  # type: ignore[arg-type]


def compress(path: Path) -> None:
    """Keep few colours: the picture is kept in the repository."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def take_notebook(lab: HeadlessLab, notebook: Path, theme: Literal["light", "dark"], path: Path) -> None:
    """Run a notebook to the last of its tagged cells and take the picture of these.

    Raises:
        ValueError: no cell has the tag.
    """
    opened = nbformat.read(notebook, as_version=4)
    cells = opened.cells
    tagged = [index for index, cell in enumerate(cells) if TAG in cell.metadata.get("tags", ())]
    if not tagged:
        raise ValueError(f"{notebook.name}: no cell has the tag {TAG}")
    code = [index for index, cell in enumerate(cells) if cell.cell_type == "code"]
    for index in code:
        cells[index].update(outputs=[], execution_count=None)
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(opened, Path(folder) / notebook.name)
        page = lab.open(Path(folder) / notebook.name, theme=theme, viewport=(WIDTH, HEIGHT))
    for index in code:
        if index <= tagged[-1]:
            page.run(index)
    page.wait_idle()
    outside = next(index for index in range(len(cells)) if not tagged[0] <= index <= tagged[-1])
    page.cell(outside).locator(".jp-InputPrompt").click()  # the chosen cell has a toolbar
    crop(page, tagged[0], tagged[-1], path)
    page.run(code[-1])  # it ends what the notebook has started
    page.close()


def kill_a_worker() -> str:
    """Kill the process of one worker, as a power cut would; its address."""
    engines = run_blocking(running_engines())
    name, pid = sorted((engine.name, engine.pid) for engine in engines if engine.kind == "worker")[1]
    psutil.Process(pid).kill()
    return name


def take_survival(lab: HeadlessLab, theme: Literal["light", "dark"], path: Path) -> None:
    """Ask a real model over three workers, kill one in mid-answer, and take a picture of what the cell
    shows then and in the end.

    Raises:
        RuntimeError: the answer does not report the loss, so it was complete before the kill.
    """
    page = lab.open([SETUP, ASK], theme=theme, viewport=(WIDTH, HEIGHT))
    page.run(0)
    page.start(1)
    page.cell(0).locator(".jp-InputPrompt").click()  # the other one is then shown without its toolbar
    page.page.wait_for_function(
        "([cells, chars]) => document.querySelectorAll(cells)[1].innerText.length > chars",
        arg=[CELLS, len(ASK) + BEFORE_THE_KILL_CHARS],
    )
    victim = kill_a_worker()
    page.wait_for_text(1, re.compile(f"lost worker {re.escape(victim)}; loading|{re.escape(victim)} at token"))
    with tempfile.TemporaryDirectory() as folder:
        during, after = Path(folder) / "during.png", Path(folder) / "after.png"
        crop(page, 1, 1, during)
        page.wait_done(1)
        shown = page.output_text(1)
        lost = re.search(rf"lost {re.escape(victim)} at token \d+, continued after ([\d.]+ m?s)", shown)
        if lost is None:
            raise RuntimeError(f"the answer was complete before {victim} was killed:\n{shown}")
        crop(page, 1, 1, after)
        captions = (
            f"1. In the middle of an answer, the worker at {victim} is killed.",
            f"2. {lost[1]} later, the other two continue the answer. No word is lost, and none comes twice.",
        )
        figures = "".join(
            f"<figure><figcaption>{caption}</figcaption>"
            f"<img src='data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}'></figure>"
            for caption, picture in zip(captions, (during, after), strict=True)
        )
    page.close()
    blank = lab.new_page()
    blank.set_viewport_size({"width": WIDTH, "height": 100})
    blank.set_content(FIGURE.format(figures=figures))
    blank.screenshot(path=path, full_page=True)
    blank.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"{SURVIVAL}, or beginnings of notebooks' names (default: all)")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--folder", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        print(NO_CHROMIUM, file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in (SURVIVAL, *NOTEBOOKS) if name.startswith(tuple(arguments.names or [""]))]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        own = {
            "SOLLOL_STATE_DIR": str(folder / "state"),
            "SOLLOL_CONFIG": "0",
            "SOLLOL_CONTEXT_CACHE_GB": "0",  # the footers are the same each time
            "SOLLOL_KEEP_ALIVE": "30s",  # nobody uses these engines later
            "SOLLOL_MODELS": f"{MODEL}={smollm2_path()}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")]),
        }
        program = find_ollama()
        ollama = OllamaServer(program, folder / "ollama") if program else None
        if ollama is not None:
            ollama.start().create("demo")
            own |= {"OLLAMA_HOST": f"127.0.0.1:{ollama.port}", "OLLAMA_MODELS": str(ollama.models_folder)}
        os.environ |= own  # also here, where the worker to kill is looked up
        try:
            with headless_lab(chromium, folder / "lab", folder, scale=SCALE, **own) as lab:
                for name in wanted:
                    path = arguments.folder / f"{name}.png"
                    if name == SURVIVAL:
                        take_survival(lab, arguments.theme, path)
                    else:
                        take_notebook(lab, NOTEBOOKS[name], arguments.theme, path)
                    compress(path)
                    run_blocking(stop_engines(also_used=True))
                    print(f"{path}: {path.stat().st_size // 1024} KiB", flush=True)
        finally:
            run_blocking(stop_engines(also_used=True))
            if ollama is not None:
                ollama.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
