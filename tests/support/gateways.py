"""Gateways on one port, one after the other: each is killed, and the next one finds its engines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.support.engines import unused_port
from tests.support.gateway import GatewayProcess, running_gateway


class Gateways:
    """A gateway that can be killed and started again.

    Attributes:
        url: of all of them.
        running: the last one.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: for their state."""
        port = unused_port()
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._variables = {"SOLLOL_STATE_DIR": str(folder), "SOLLOL_AUTO_SETUP": "1"}
        self._stack = ExitStack()
        self.running: GatewayProcess = self.start()

    def start(self) -> GatewayProcess:
        """Start the next one."""
        process = running_gateway("--port", str(self._port), variables=self._variables)
        self.running = self._stack.enter_context(process)
        return self.running

    def kill(self) -> None:
        """Kill the running one; its engines run on."""
        self.running.process.kill()
        self.running.wait()

    def restart(self) -> None:
        """Kill the running one, and start the next."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End the last one."""
        self._stack.close()
