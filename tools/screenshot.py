"""Run a notebook in a real JupyterLab in headless Chromium and take a picture of it.

    python tools/screenshot.py notebooks/01_quickstart.ipynb notebooks/images/quickstart.png

Needs the `dev` extra and a Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.lab.lab import NO_CHROMIUM, find_chromium, headless_lab

WIDTH = 1250


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--height", type=int, default=1500, help="of the page, in CSS pixels")
    parser.add_argument("--clip", type=int, nargs=2, metavar=("TOP", "BOTTOM"), help="only these pixel rows")
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        print(NO_CHROMIUM, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # Nobody uses these engines later.
        own = {"SOLLOL_STATE_DIR": str(folder / "state"), "SOLLOL_KEEP_ALIVE": "5s"}
        with headless_lab(chromium, folder / "lab", folder, **own) as lab:
            page = lab.open(arguments.notebook, theme=arguments.theme, viewport=(WIDTH, arguments.height))
            page.run_all()
            taken = page.screenshot("notebook", arguments.clip)
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(taken, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
