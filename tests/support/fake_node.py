"""A server at an Ollama node's address that does what a real Ollama does not do on demand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "llama3.2:latest"
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"

Reply = bytes | Callable[[], Iterator[bytes]]
"""What is sent to a request: bytes, or piece after piece."""


def reply(body: Any, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP answer; anything but bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


def lines(*chunks: Any) -> bytes:
    """A streamed answer of these chunks; bytes are sent as they are."""
    return HEAD + b"".join(
        chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode() + b"\n" for chunk in chunks
    )


HEALTHY: Mapping[str, Reply] = {
    "/api/version": reply({"version": "0.17.4"}),
    "/api/tags": reply({"models": [{"name": MODEL, "digest": "d"}]}),
    "/api/ps": reply({"models": []}),
    "/api/chat": lines({"message": {"role": "assistant", "content": "hello"}, "done": True, "eval_count": 1}),
}


@contextlib.contextmanager
def fake_node(replies: Mapping[str, Reply]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """The URL of a node with these replies by path (others are those of a healthy node), and the requests that it
    has received: path and JSON body. A path that nobody gives is answered with 404."""
    received: list[tuple[str, Any]] = []
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            received.append((self.path, json.loads(body) if body else None))
            answer = {**HEALTHY, **replies}.get(self.path, reply(b"", "404 Not Found"))
            self.close_connection = True
            with contextlib.suppress(OSError):
                for piece in [answer] if isinstance(answer, bytes) else answer():
                    if closing.is_set():
                        return
                    self.wfile.write(piece)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
