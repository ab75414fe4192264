"""Loading the extension is quick: it imports neither the backends nor large libraries."""

from __future__ import annotations

import subprocess
import sys

LOAD = """
import sys
from IPython.core.interactiveshell import InteractiveShell
from sollol_nb.notebook import tab_completion

tab_completion.models_of_nodes = list  # it runs in another thread, and may import more
InteractiveShell.instance().run_line_magic("load_ext", "sollol_nb")
heavy = {"pandas", "numpy", "matplotlib", "ipywidgets", "jinja2", "jsonschema", "gguf"}
heavy |= {"httpx", "psutil", "filelock"}
heavy |= {f"sollol_nb.{package}" for package in ("llama_cpp", "ollama", "router", "cluster", "widget")}
print(sorted(heavy & set(sys.modules)))
"""


def test_loading_the_extension_imports_neither_backends_nor_large_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
