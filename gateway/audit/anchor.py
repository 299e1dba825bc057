"""The anchor: a deployment's log of logs, under its one public key, for as long as it lives.

Its events name checkpoints of all other logs, so that none can be cut back or taken away unseen; and
what was erased from them, by whose word. It is the one log that is reopened: for each round, under
its lock, and only if its end is what was signed last. Its origin is its key's name, so that a witness
needs to know nothing else of a deployment.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from gateway.audit.envelope import Envelope
from gateway.audit.event import Event
from gateway.audit.files import LogFiles
from gateway.audit.verify import ANCHOR
from gateway.audit.writer import LogWriter
from gateway.clock import Clock
from keys.signing import Signer

WITNESSED: Final = "witnessed"
"""The latest note of the anchor that a quorum of witnesses has cosigned."""


class _Line(msgspec.Struct, gc=False):
    type: str
    log: str = ""
    size: int = 0


class Anchor:
    """A deployment's anchor log, below its audit folder."""

    def __init__(self, audit: Path, signer: Signer, clock: Clock) -> None:
        self.files = LogFiles(audit / ANCHOR)
        self.sizes: dict[str, int] = {}
        self._directory = audit / ANCHOR
        self._signer = signer
        self._envelope = Envelope(signer.name, clock)
        self._read_until = 0

    def append(self, events: Sequence[Event]) -> None:
        """Add events, durably and signed.

        Raises:
            BlockingIOError: Another process is at it; later it will not be.
            Damaged: The log's end is not what was signed last.
            OSError: It cannot be written.
        """
        with self._lock():
            writer = self._open()
            first = writer.size
            lines = [self._envelope.line(event, first + at) for at, event in enumerate(events)]
            if lines:
                writer.write(lines)
                writer.extend(lines)
            # A crash here leaves events that are durable and unsigned; the next round signs them.
            writer.close()
        self.files = LogFiles(self._directory)

    def refresh(self) -> None:
        """Learn which logs were anchored at which size, also by another process."""
        decode = msgspec.json.Decoder(_Line).decode
        for index, data in self.files.lines(self._read_until):
            line = decode(data)
            if line.type == "log.anchored":
                self.sizes[line.log] = line.size
            self._read_until = index + 1

    def _open(self) -> LogWriter:
        name = self._signer.name
        if (self._directory / "seg").is_dir() and LogFiles(self._directory).segments():
            return LogWriter.resume(self._directory, name, self._signer.sign_note)
        if (self._directory / "seg").is_dir():
            (self._directory / "seg").rmdir()  # a crash while it was made
        return LogWriter.create(
            self._directory, name, self._signer.sign_note, stamp=lambda _: "", delegation=""
        )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep others out also before the log's folder exists, which has a lock of its own."""
        fd = os.open(self._directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(fd)
