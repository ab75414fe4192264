"""A way to a server that can be cut, as by a laptop that falls asleep."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PIECE_BYTES = 65_536


class CuttableProxy:
    """Passes TCP connections of a port of loopback on to another one, until it is cut."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._is_cut = False
        self._lock = threading.Lock()  # no connection is made while they are cut
        self._ends: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections, and take no new ones."""
        with self._lock:
            self._is_cut = True
            while self._ends:
                end = self._ends.pop()
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def join(self) -> None:
        """Take connections again."""
        self._is_cut = False

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                with self._lock:
                    if self._is_cut:
                        near.close()
                        continue
                    far = socket.create_connection(("127.0.0.1", self._to_port))
                    self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while piece := one.recv(_PIECE_BYTES):
            other.sendall(piece)
    with suppress(OSError):
        other.shutdown(socket.SHUT_WR)


@contextmanager
def cuttable(to_port: int) -> Iterator[CuttableProxy]:
    """In this context, a proxy to a port of loopback."""
    proxy = CuttableProxy(to_port)
    try:
        yield proxy
    finally:
        proxy.close()
