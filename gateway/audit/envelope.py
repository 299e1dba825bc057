"""The line that an event becomes: an envelope (`v`, `origin`, `ts`, `seq`, `salt`), then its own fields.

The salt makes the hash of a line that was erased say nothing of what the line said. No I/O.
"""

import json
import secrets
from datetime import UTC, datetime

import msgspec

from gateway.audit.event import VERSION, Event
from gateway.clock import Clock

_encoder = msgspec.json.Encoder()


class Envelope:
    """Makes the lines of one log."""

    def __init__(self, origin: str, clock: Clock) -> None:
        self._clock = clock
        self._second = -1
        self._second_text = ""
        self._salts = ""
        self._format = (
            f'{{"v":{VERSION},"origin":{json.dumps(origin)},"ts":"%s.%06dZ","seq":%d,"salt":"%s",'
        )

    def line(self, event: Event, seq: int) -> bytes:
        """Return the line of the event whose index is `seq`, without a line feed."""
        now = self._clock.now()
        second = int(now)
        if second != self._second:
            self._second = second
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        if len(self._salts) < 32:
            self._salts = secrets.token_hex(2048)
        salt, self._salts = self._salts[-32:], self._salts[:-32]
        micros = int((now - second) * 1_000_000)
        envelope = self._format % (self._second_text, micros, seq, salt)
        return envelope.encode() + _encoder.encode(event)[1:]
