"""The examples in the help of each magic, and what they show."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tests.support.kernels import Kernel

NO_CODE = "SollolError: the answer has no code block"  # the demo model writes none
EXPECTED_ERRORS = {
    # `add` has not taken it: nothing runs there.
    "%sollol_cluster remove 192.168.1.10:50052": "ConfigError: 192.168.1.10:50052 is not a known worker",
    "%sollol_insert": NO_CODE,
    "%sollol_insert 2": NO_CODE,
    "%sollol_insert --answer reply": NO_CODE,
    "%sollol_connect http://head:11440": "GatewayUnavailableError: no gateway answers at http://head:11440",
}


def examples(help_: str) -> list[str]:
    """The cells of a magic's examples: paragraphs after `Example::`, up to the next text at the margin."""
    indented = re.search(r"Example::\n\n((?: +.*\n|\n)+)", help_)
    assert indented is not None, help_
    paragraphs = re.split(r"\n\s*\n", indented[1].strip("\n"))
    return ["\n".join(line.strip() for line in text.splitlines()) for text in paragraphs if text.strip()]


def run_examples(notebook: Kernel, magic: str, expected_errors: Mapping[str, str] = EXPECTED_ERRORS) -> None:
    """Run the examples of a magic; each shows no error, or the expected one."""
    help_ = eval(notebook.value(f"get_ipython().magics_manager.magics['line'][{magic!r}].__doc__"))
    cells = examples(help_)
    assert cells
    assert any(magic in cell for cell in cells)
    for cell in cells:
        shown = notebook.run(cell)
        if cell in expected_errors:
            assert expected_errors[cell] in shown.error[0], cell
        else:
            assert (shown.error, [line for line in shown.stream.splitlines() if "Error" in line]) == ([], []), cell
