"""Keeping a credential that a provider quotes out of what the caller gets.

Bodies are searched only where the provider answers with an error; a good answer passes as it came.
Header fields are searched in every answer, where one is long enough to hold the credential. What is
held between two reads is only what may be the beginning of the credential, so that an error that is
an event stream goes on streaming. No I/O.
"""

from collections.abc import Callable, Sequence

from gateway.providers.headers import Header

Blot = Callable[[bytearray], int]
"""Blots the credential out, as `keys.echo.blot` does; raises `Refused` if it can be had no more."""


class EchoFilter:
    """Passes the body of an error on, without the credential."""

    def __init__(self, blot: Blot, credential_bytes: int) -> None:
        self._blot = blot
        self._credential_bytes = credential_bytes
        self._held = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Return what of the body may pass now.

        Raises:
            Refused: The credential can be compared no more; nothing may pass.
        """
        body = self._held + data
        passing = len(body) - self._blot(body)
        self._held = body[passing:]
        return bytes(body[:passing])

    def end(self) -> bytes:
        """Return what was held; most of a credential, cut short, is as good as all of it."""
        held, self._held = self._held, bytearray()
        return b"*" * len(held) if 2 * len(held) > self._credential_bytes else bytes(held)


def without_echo(fields: list[Header], blot: Blot, credential_bytes: int) -> list[Header]:
    """Return header fields without the credential.

    Raises:
        Refused: One may hold it, and it can be compared no more.
    """
    if not _may_hold(fields, credential_bytes):
        return fields
    # A line feed is in no field and in no credential: nothing is found across two fields.
    lines = bytearray(b"\n".join(b"%b: %b" % field for field in fields))
    blot(lines)
    split = (line.partition(b": ") for line in bytes(lines).split(b"\n"))
    return [(name, value) for name, _, value in split]


def _may_hold(fields: Sequence[Header], credential_bytes: int) -> bool:
    for name, value in fields:  # noqa: SIM110 - every answer pays; a generator costs twice as much
        if len(value) >= credential_bytes or len(name) >= credential_bytes:
            return True
    return False
