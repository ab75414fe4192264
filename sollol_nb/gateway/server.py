"""The HTTP server of the gateway: it runs on the I/O loop, and ends without losing an answer."""

from __future__ import annotations

import socket
from concurrent.futures import Future

import uvicorn

from sollol_nb.errors import ConfigError
from sollol_nb.gateway.app import application
from sollol_nb.gateway.gateway import Gateway
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import submit
from sollol_nb.settings.kinds import LOCAL

DEFAULT_PORT = 11440
"""Not that of Ollama (11434), of ollama-herd (11435) or of llama-server (8080)."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from None


def serve(host: str, port: int) -> None:
    """Run a gateway until SIGINT or SIGTERM."""
    listening = listen(host, port)
    running: Future[None] = submit(_serve(listening))
    running.result()


async def _serve(listening: socket.socket) -> None:
    ollama = OllamaPool.auto_configure()
    router = HybridRouter(ollama, gateway=LOCAL)
    gateway = Gateway(router, ollama)
    config = uvicorn.Config(application(gateway), lifespan="off", access_log=False, log_config=None)
    server = uvicorn.Server(config)
    host, port = listening.getsockname()[:2]
    print(f"the gateway listens on http://{host}:{port}", flush=True)
    try:
        await server.serve(sockets=[listening])
    finally:
        await router.close(keep=True)
