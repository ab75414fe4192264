"""The entry point for jupyter-server-proxy: a tile in JupyterLab's launcher starts a gateway and opens its page.

The page then comes through Jupyter's own port and needs Jupyter's login. The gateway listens on a free port of
loopback, with the settings of the Jupyter server's environment. It ends with the server, which does not end
it when it is shut down from its menu; its engines run on for their keep_alive. At the top this module imports
nothing of the gateway, since Jupyter loads it at each start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 30
LOOK_EVERY_S = 1.0


def gateway_process() -> dict[str, Any]:
    """How jupyter-server-proxy starts and shows the gateway (its documentation calls this a server process)."""
    return {
        "command": [sys.executable, "-m", __spec__.name, "--host", "127.0.0.1", "--port", "{port}"],
        "timeout": START_TIMEOUT_S,
        # The gateway accepts only host names of its machine, not the hub's name.
        "request_headers_override": {"Host": "127.0.0.1:{port}"},
        "update_last_activity": False,  # an open page must not keep an idle server running
        "launcher_entry": {
            "enabled": find_spec("uvicorn") is not None,  # part of the extra `gateway`
            "title": "sollol cluster",
            "icon_path": str(Path(__file__).parent / "assets" / "icon.svg"),
            "category": "Notebook",  # in other categories JupyterLab shows no icon
        },
    }


def main() -> int:
    """Run a gateway until its parent process, the Jupyter server, has ended; returns the exit code."""
    from sollol_nb.gateway.command import main as run_gateway

    threading.Thread(target=_end_with, args=(psutil.Process(os.getppid()),), daemon=True).start()
    return run_gateway()


def _end_with(parent: psutil.Process) -> None:
    while _is_alive(parent):
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main())
