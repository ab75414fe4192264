"""A TCP proxy that passes on after a delay what is sent through it: how `clusters.py` makes workers far away.

    python benchmarks/delay_proxy.py HOST PORT ROUND_TRIP_SECONDS

Prints the loopback port that it listens on. What goes to HOST waits for the whole round trip, the answers do not
wait. Each direction of a connection has two threads, since a thread sleeps more exactly than an event loop waits
(0.06 ms too long, not up to 1 ms).
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time

PIECE_BYTES = 256 * 1024
PIECES_UNDER_WAY = 256  # at most 64 MB


def pass_on(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Copy one direction until its end, then end it at the other side too."""
    under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(PIECES_UNDER_WAY)

    def send() -> None:
        is_open = True
        while True:
            due, piece = under_way.get()
            if (wait_s := due - time.monotonic()) > 0:
                time.sleep(wait_s)
            try:
                if not piece:
                    target.shutdown(socket.SHUT_WR)
                elif is_open:
                    target.sendall(piece)
            except OSError:
                is_open = False
            if not piece:
                return

    threading.Thread(target=send, daemon=True).start()
    piece = b"."
    while piece:
        try:
            piece = source.recv(PIECE_BYTES)
        except OSError:
            piece = b""
        under_way.put((time.monotonic() + delay_s, piece))


def main() -> None:
    host, port, delay_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((host, port), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=pass_on, args=(near, far, delay_s), daemon=True).start()
            threading.Thread(target=pass_on, args=(far, near, 0.0), daemon=True).start()


if __name__ == "__main__":
    main()
