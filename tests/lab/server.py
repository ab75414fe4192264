"""A separate Jupyter server, such as JupyterLab's: loopback, a free port, a token, and folders of its own.

Nothing of the user's Jupyter is read or written, and nothing is fetched from elsewhere. What would pop up over a
page (news, updates) or make it differ from run to run (autosave, a hasty completer) is switched off.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0

SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes": {"adaptive-theme": True},  # the page's colour scheme chooses light or dark
    "completer-extension/manager": {"providerTimeout": 60_000},  # ms; by default a busy kernel is not waited for
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {
        "autoStartDefaultKernel": True,  # no dialog that asks for one
        "windowingMode": "none",  # all cells have their text, in view or not
    },
}


class LabServer:
    """One `jupyter lab` process and its kernels, or one of another application.

    Args:
        folder: for everything that it writes; notebooks are in `notebooks` below it.
        application: the module of the application: `jupyterlab`, `notebook` or `jupyter_server`.
        extensions: the server's extensions, which are all off without configuration files.
        options: more options of its command line.
        environment: more environment variables for the server, and so for its kernels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        application: str = "jupyterlab",
        extensions: Sequence[str] = ("jupyter_server_proxy",),
        options: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.notebooks = folder / "notebooks"
        self.log_path = folder / "server.log"
        self._application = application
        self._options = [*(f"--ServerApp.jpserver_extensions={name}=True" for name in extensions), *options]
        self.token = secrets.token_hex(16)
        self.url = ""
        self._runtime = folder / "runtime"
        self._environment = os.environ | {
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_NO_CONFIG": "1",
            "JUPYTER_RUNTIME_DIR": str(self._runtime),
            "JUPYTER_TOKEN": self.token,
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            **environment,
        }
        self._process: psutil.Popen | None = None
        self.notebooks.mkdir(parents=True)
        for name, values in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")

    def start(self) -> None:
        """Start, and wait until it answers.

        Raises:
            RuntimeError: it ended or did not answer in time; with the end of its log.
        """
        options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", *self._options]
        with self.log_path.open("wb") as log:
            self._process = psutil.Popen(
                [sys.executable, "-m", self._application, *options],
                cwd=self.notebooks,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            # It writes this file once it listens; while it writes, the file may be half there.
            with suppress(OSError, ValueError):
                information = self._runtime / f"jpserver-{self._process.pid}.json"
                self.url = json.loads(information.read_text(encoding="utf-8"))["url"]
                self.ask("GET", "api/status")
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(
            f"{self._application} did not start:\n{self.log_path.read_text(errors='replace')[-2000:]}"
        )

    def page_of(self, notebook: str) -> str:
        """The path of the page that shows a notebook and nothing else, given its file name."""
        page = "notebooks" if self._application == "notebook" else "doc/tree"
        return f"{page}/{notebook}?token={self.token}&reset"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that the server's REST API answers to a body as JSON, None where it answers with nothing."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=STOP_LIMIT_S) as answer:
            return json.loads(answer.read() or b"null")

    def end_kernel(self, notebook: str) -> None:
        """Shut down the kernel of a notebook, given by its file name."""
        for session in self.ask("GET", "api/sessions"):
            if session["path"] == notebook:
                self.ask("DELETE", f"api/sessions/{session['id']}")

    def stop(self) -> None:
        """End the server and its kernels: asked first, then killed."""
        if self._process is None:
            return
        with suppress(psutil.NoSuchProcess):
            kernels = self._process.children()
            with suppress(OSError):
                self.ask("POST", "api/shutdown")
            for processes in ([self._process], kernels):
                for left in psutil.wait_procs(processes, timeout=STOP_LIMIT_S)[1]:
                    left.kill()
        self._process = None
