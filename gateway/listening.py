"""The listening sockets of a gateway. The supervisor holds each for its lifetime.

A connection that arrives while the process that would accept it is being replaced waits in the
socket's backlog, since the socket itself never closes.
"""

import socket

from gateway.config import Listener, Listeners

BACKLOG = 1024
"""Connections that may wait for a process that is being replaced, per socket."""


class Listening:
    """Every listening socket: one for sessions, one for operators, one for each worker."""

    def __init__(self, listeners: Listeners, workers: int) -> None:
        (self.sessions,) = _bind(listeners.sessions, 1)
        (self.admin,) = _bind(listeners.admin, 1)
        self.proxies = _bind(listeners.proxy, workers)
        self.addresses = {
            "proxy": _url(listeners.proxy, self.proxies[0]),
            "sessions": _url(listeners.sessions, self.sessions),
            "admin": _url(listeners.admin, self.admin),
        }

    def close(self) -> None:
        """Refuse connections from now on, as far as this process is concerned."""
        for sock in (self.sessions, self.admin, *self.proxies):
            sock.close()


def _bind(listener: Listener, count: int) -> list[socket.socket]:
    """Return `count` sockets on one address; the kernel spreads connections over them."""
    sockets: list[socket.socket] = []
    host, port = listener.host, listener.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(count):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if count > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        port = sock.getsockname()[1]
        sockets.append(sock)
    return sockets


def _url(listener: Listener, sock: socket.socket) -> str:
    scheme = "https" if listener.certificate else "http"
    host = f"[{listener.host}]" if ":" in listener.host else listener.host
    return f"{scheme}://{host}:{sock.getsockname()[1]}"
