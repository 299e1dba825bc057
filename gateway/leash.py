"""The leash: one socket pair between the supervisor and each of its children.

Its end is the message that matters most: where it breaks, the supervisor is gone, and a child with
every session it holds ends at once. Over it the supervisor hands down new relay ends and tells a
child to make room for its successor; a child says one thing, that it serves.

The supervisor has no event loop: it is signalled (SIGIO) when there is something to hear. Messages
are whole packets (SOCK_SEQPACKET), so that a descriptor always belongs to the words it came with.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable
from typing import Final

import msgspec

MAX_MESSAGE_BYTES: Final = 4096
"""The largest is the restart counters: two roles."""

SEND_SECONDS: Final = 5.0
"""How long a child may leave its leash unread before it is taken for stuck."""


class NewRelay(msgspec.Struct, frozen=True, kw_only=True, tag="new-relay"):
    """Here is your end of a relay, between the control process and this worker."""

    worker: int


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag="retire"):
    """Finish what is under way and end; a successor goes on, so sessions stay open."""


class Restarts(msgspec.Struct, frozen=True, kw_only=True, tag="restarts"):
    """How often a process died and was started again, by role."""

    counts: dict[str, int]


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag="serving"):
    """A child's only word: it listens."""


Order = NewRelay | Retire | Restarts
_encoder = msgspec.msgpack.Encoder()
_order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


class Holder:
    """The supervisor's end of one leash."""

    def __init__(self) -> None:
        self._sock, self.child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Whatever a child says, or its end, raises SIGIO, which the supervisor waits for.
        fcntl.fcntl(self._sock, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._sock, fcntl.F_GETFL)
        fcntl.fcntl(self._sock, fcntl.F_SETFL, flags | os.O_ASYNC)

    def order(self, order: Order, *sockets: socket.socket) -> bool:
        """Send an order, with sockets that the child then owns too; return whether it is on its way.

        It is not where the child is gone, or has not read for `SEND_SECONDS`.
        """
        self._sock.settimeout(SEND_SECONDS)
        try:
            socket.send_fds(self._sock, [_encoder.encode(order)], [s.fileno() for s in sockets])
        except OSError:
            return False
        return True

    def hears_serving(self) -> bool:
        """Return whether the child has said since the last time that it serves."""
        self._sock.setblocking(False)
        try:
            return bool(self._sock.recv(MAX_MESSAGE_BYTES))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the leash of a child that is gone."""
        self._sock.close()


class Leash:
    """A child's end. `on_order` hears each order with its sockets; `on_cut` runs once, at the end."""

    def __init__(
        self,
        fd: int,
        on_order: Callable[[Order, list[socket.socket]], None],
        on_cut: Callable[[], None],
    ) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self._on_order = on_order
        self._on_cut = on_cut
        asyncio.get_running_loop().add_reader(self._sock, self._read)

    def tell_serving(self) -> None:
        """Say that this process listens."""
        try:
            self._sock.send(_encoder.encode(Serving()))
        except OSError:
            pass  # the supervisor is gone, which the reader hears

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(
                self._sock, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        sockets = [socket.socket(fileno=fd) for fd in fds]
        try:
            order = _order_decoder.decode(data) if data else None
        except msgspec.DecodeError:
            order = None  # both ends are ours: a defect, and nobody to obey
        if order is None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._on_cut()
        else:
            self._on_order(order, sockets)
