"""The gateway that jupyter-server-proxy starts ends with the Jupyter server, however that ends."""

from __future__ import annotations

from importlib.metadata import entry_points

import psutil

from sollol_nb.gateway.server_proxy import gateway_process
from tests.support.engines import eventually, is_alive, script

# Its output is that of the gateway that it starts.
PARENT = """
import subprocess, sys
from sollol_nb.gateway.server_proxy import gateway_process
command = [part.format(port=0) for part in gateway_process()["command"]]
gateway = subprocess.Popen(command)
print("pid", gateway.pid, flush=True)
gateway.wait()
"""


def test_the_gateway_ends_with_the_process_that_started_it() -> None:
    with script(PARENT) as parent:
        assert parent.stdout is not None
        pid, listens = sorted(parent.stdout.readline() for _ in range(2))  # of two processes, in any order
        gateway = psutil.Process(int(pid.removeprefix("pid ")))
        assert listens.startswith("the gateway listens on")
        parent.kill()
        eventually(lambda: not is_alive(gateway), "the gateway has ended")


def test_jupyter_finds_the_gateway_by_its_entry_point() -> None:
    (found,) = entry_points(group="jupyter_serverproxy_servers", name="sollol")
    assert found.load() is gateway_process
