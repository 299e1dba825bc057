"""The leash: one socket pair between the supervisor and each of its children.

Its end is the message that matters most: where it breaks, the supervisor is gone, and a child with
every session it holds ends at once. Over it the supervisor hands down new relay ends and policies,
and tells a child to make room for its successor; a child says that it serves.

The supervisor has no event loop: it is signalled (SIGIO) when there is something to hear. Messages
are whole packets (SOCK_SEQPACKET), so that a descriptor always belongs to the words it came with.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from gateway.bundles import Bundle

MAX_MESSAGE_BYTES: Final = 4096
"""Of one packet; a larger order travels in a memory file. Policies alone are larger."""

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


class UsePolicies(msgspec.Struct, frozen=True, kw_only=True, tag="use-policies"):
    """Decide by these policies from now on; they were compiled and tested."""

    bundle: Bundle


class PoliciesRefused(msgspec.Struct, frozen=True, kw_only=True, tag="policies-refused"):
    """Policies that lie there now cannot be used; those in force stay."""

    faults: tuple[str, ...]


class _InFile(msgspec.Struct, frozen=True, tag="in-file"):
    """The order is in the memory file that comes with this: it is too large for a packet."""


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag="serving"):
    """A child says that it listens."""


class LookAtPolicies(msgspec.Struct, frozen=True, kw_only=True, tag="look-at-policies"):
    """A child asks that the policies be read again, without waiting for the watch."""


Order = NewRelay | Retire | Restarts | UsePolicies | PoliciesRefused
Word = Serving | LookAtPolicies
_encoder = msgspec.msgpack.Encoder()
_order_decoder: msgspec.msgpack.Decoder[Order | _InFile] = msgspec.msgpack.Decoder(Order | _InFile)
_word_decoder: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def _memory_file(content: bytes) -> int:
    """Return the descriptor of a file in memory with this content."""
    file = os.memfd_create("veklom-order", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    return file


def _content(file: int) -> bytes:
    """Return what a memory file holds, and close it."""
    try:
        return os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)


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
        encoded = _encoder.encode(order)
        descriptors = [each.fileno() for each in sockets]
        file = -1
        try:
            if len(encoded) > MAX_MESSAGE_BYTES:
                file = _memory_file(encoded)
                encoded, descriptors = _encoder.encode(_InFile()), [file]
            socket.send_fds(self._sock, [encoded], descriptors)
        except OSError:
            return False
        finally:
            if file >= 0:
                os.close(file)
        return True

    def words(self) -> Iterator[Word]:
        """Yield what the child has said since the last time."""
        self._sock.setblocking(False)
        try:
            while data := self._sock.recv(MAX_MESSAGE_BYTES):
                yield _word_decoder.decode(data)
        except (OSError, msgspec.DecodeError):
            return

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
        self._say(Serving())

    def ask_for_policies(self) -> None:
        """Ask that the policies be read again now; `UsePolicies` or `PoliciesRefused` answers.

        Where they are what is in force already, nothing comes.
        """
        self._say(LookAtPolicies())

    def _say(self, word: Word) -> None:
        try:
            self._sock.send(_encoder.encode(word))
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
        sockets: list[socket.socket] = []
        try:
            order = _order_decoder.decode(data) if data else None
            if isinstance(order, _InFile):
                order = _order_decoder.decode(_content(fds.pop()))
            sockets = [socket.socket(fileno=fd) for fd in fds]
        except (msgspec.DecodeError, IndexError):
            order = None  # both ends are ours: a defect, and nobody to obey
        if order is None or isinstance(order, _InFile):
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._on_cut()
        else:
            self._on_order(order, sockets)
