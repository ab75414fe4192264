"""The entry point for jupyter-server-proxy: a tile in JupyterLab's launcher starts a gateway and opens its page.

The page then comes through Jupyter's own port and needs Jupyter's login. The gateway listens on a free port of
loopback, with the settings of the Jupyter server's environment, and ends with the server; its engines live on for
their keep_alive. This module imports nothing of the gateway, since Jupyter loads it at each start.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 30


def gateway_process() -> dict[str, Any]:
    """How jupyter-server-proxy starts and shows the gateway (its documentation calls this a server process)."""
    return {
        "command": [sys.executable, "-m", "sollol_nb.gateway", "--port", "{port}"],
        "timeout": START_TIMEOUT_S,
        # The gateway answers only under a name of its own machine, not under the hub's.
        "request_headers_override": {"Host": "127.0.0.1:{port}"},
        "update_last_activity": False,  # an open page is no reason to keep an idle server
        "launcher_entry": {
            "enabled": find_spec("uvicorn") is not None,  # it is part of the extra `gateway`
            "title": "sollol cluster",
            "icon_path": str(Path(__file__).parent / "assets" / "icon.svg"),
            "category": "Notebook",  # in other categories JupyterLab shows no icon
        },
    }
