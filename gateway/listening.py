"""The listening sockets of a gateway. The supervisor holds each for its lifetime.

A connection that arrives while the process that would accept it is being replaced waits in the
socket's backlog, since the socket itself never closes.
"""

import socket

from gateway.config import ConfigurationError, Listener, Listeners, why

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
    """Return `count` sockets on one address; the kernel spreads connections over them.

    Raises:
        ConfigurationError: The address cannot be had; one line says why.
    """
    sockets: list[socket.socket] = []
    host, port = listener.host, listener.port
    try:
        if count > 1 and port:
            # Sockets that share a port would share it with another gateway's too, unseen.
            _bound(host, port, shares=False).close()
        for _ in range(count):
            sockets.append(_bound(host, port, shares=count > 1))
            port = sockets[-1].getsockname()[1]
        for sock in sockets:
            sock.listen(BACKLOG)
    except OSError as error:
        raise ConfigurationError((f"cannot listen on {host}:{port}: {why(error)}",)) from None
    return sockets


def _bound(host: str, port: int, *, shares: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


def _url(listener: Listener, sock: socket.socket) -> str:
    scheme = "https" if listener.certificate else "http"
    host = f"[{listener.host}]" if ":" in listener.host else listener.host
    return f"{scheme}://{host}:{sock.getsockname()[1]}"
