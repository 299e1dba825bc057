"""The writer of one audit log: durable first, then acknowledged; failed once, closed for good.

`append` runs on the event loop and never blocks: it encodes the line and numbers it. What one turn of
the loop appended is handed over together at its end; one thread writes whatever has queued up with a
single write and a single fdatasync (group commit), tells the loop, then extends the Merkle tree and
signs a checkpoint when one is due.

Laws of this file:
- a waiter hears success only after its line is on the disk;
- after the first error nothing is written any more, every waiter hears of it, and every later append
  raises: a log with a hole would be worse than a gateway that refuses (fsyncgate: a failed fdatasync
  may not be tried again on the same descriptor);
- a log belongs to one writer (flock) and is never reopened: a restart begins a new one;
- what makes an event durable and signed needs no descriptor but those that are held from the start:
  whoever exhausts a process's descriptors does not end its log. What does need one, a new segment
  and the copy in `checkpoint`, waits until there is one.

On disk, below the log's directory: `seg/<first index>.jsonl` (one event a line), `checkpoints.jsonl`
(every signed note as a JSON string), `checkpoint` (the latest note) and `vkey`.
"""

import asyncio
import contextvars
import errno
import fcntl
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import msgspec

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.event import VERSION, Event, LogOpened, LogSealed
from gateway.audit.tree import Frontier
from gateway.clock import Clock
from gateway.errors import GatewayError
from gateway.telemetry.logs import get_log
from keys.signing import Signer

MAX_EVENT_BYTES: Final = 65_535
"""The largest entry of a C2SP tlog-tiles bundle."""

MAX_PENDING_EVENTS: Final = 4096
"""As many as Tessera lets wait (its pushback); beyond it the disk is not keeping up."""

MAX_PENDING_BYTES: Final = 8 * 1024 * 1024

ANONYMOUS_SHARE: Final = 0.5
"""The part of both that records of unidentified callers may fill; the rest is kept for the others."""

CHECKPOINT_EVENTS: Final = 256
CHECKPOINT_SECONDS: Final = 1.0
"""A checkpoint is due after so many events, or so long after the first unsigned one."""

MAX_SEGMENT_BYTES: Final = 64 * 1024 * 1024

_NO_DESCRIPTOR: Final = frozenset({errno.EMFILE, errno.ENFILE})

Waiter = Callable[["AuditUnavailable | None"], None]
_Item = tuple[bytes, Waiter | None]

_encoder = msgspec.json.Encoder()

log = get_log()


class AuditUnavailable(GatewayError):
    """A record cannot be made durable; nothing that needs it may happen."""

    code = "audit_unavailable"


class Journal:
    """One log and its writer thread. All methods belong to the event loop's thread."""

    def __init__(
        self,
        directory: Path,
        *,
        origin: str,
        signer: Signer,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.origin = origin
        self.vkey = signer.vkey
        self.durable_events = 0
        self._clock = clock
        self._loop = loop
        self._directory = directory
        # The writer's thread says whose log failed: what the operational log binds is the caller's.
        self._context = contextvars.copy_context()
        self._writer = _Writer(directory, origin, signer)
        self._turn: list[_Item] = []
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        self._next = 0
        self._pending_events = 0
        self._pending_bytes = 0
        self._failure: AuditUnavailable | None = None
        self._second = -1
        self._second_text = ""
        self._salts = ""
        self._envelope = (
            f'{{"v":{VERSION},"origin":{json.dumps(origin)},"ts":"%s.%06dZ","seq":%d,"salt":"%s",'
        )
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        origin: str,
        signer: Signer,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
    ) -> Self:
        """Return a new log at `directory`, which must not exist, with its first event queued.

        Raises:
            OSError: The directory cannot be made or written.
        """
        journal = cls(directory, origin=origin, signer=signer, clock=clock, loop=loop)
        journal.append(LogOpened(vkey=signer.vkey))
        journal._thread.start()
        return journal

    @property
    def has_failed(self) -> bool:
        """Whether the log takes no more events."""
        return self._failure is not None

    @property
    def pending_events(self) -> int:
        """How many events are not durable yet."""
        return self._pending_events

    def append(self, event: Event, on_durable: Waiter | None = None) -> int:
        """Queue one event; return its index. `on_durable` runs on the loop, with None or the error.

        Raises:
            AuditUnavailable: The log has failed, is full, or cannot hold an event of this size.
        """
        if self._failure is not None:
            raise self._failure
        line = self._line(event)
        size = len(line)
        if size > MAX_EVENT_BYTES:
            raise AuditUnavailable("an event is larger than an entry may be")
        share = ANONYMOUS_SHARE if event.is_anonymous else 1
        if (
            self._pending_events >= MAX_PENDING_EVENTS * share
            or self._pending_bytes > MAX_PENDING_BYTES * share
        ):
            raise AuditUnavailable("the audit log does not keep up")
        self._pending_events += 1
        self._pending_bytes += size
        index = self._next
        self._next = index + 1
        if not self._turn:
            # Waking the writer for every event would make it fight the loop for the interpreter.
            self._loop.call_soon(self._hand_over)
        self._turn.append((line, on_durable))
        return index

    def _hand_over(self) -> None:
        if self._turn:
            self._queue.put(self._turn)
            self._turn = []

    def _line(self, event: Event) -> bytes:
        now = self._clock.now()
        second = int(now)
        if second != self._second:
            self._second = second
            self._second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        if len(self._salts) < 32:
            self._salts = os.urandom(4096).hex()
        salt, self._salts = self._salts[-32:], self._salts[:-32]
        micros = int((now - second) * 1_000_000)
        envelope = self._envelope % (self._second_text, micros, self._next, salt)
        return envelope.encode() + _encoder.encode(event)[1:]

    def close(self) -> None:
        """Write what is queued, seal the log and sign it. Blocks until it is on the disk."""
        self._hand_over()
        self._queue.put(None)
        self._thread.join()
        # The writer's files are this thread's now.
        writer = self._writer
        self._attempt(writer.checkpoint_if_unsigned)
        if self._failure is None:
            line = self._line(LogSealed(checkpoints=writer.checkpoints))
            self._commit([line], [])
        self._attempt(writer.close)

    # --- the writer thread ---

    def _write(self) -> None:
        writer, pending = self._writer, self._queue
        while True:
            try:
                first = pending.get(timeout=writer.seconds_to_checkpoint())
            except queue.Empty:
                self._attempt(writer.checkpoint)
                continue
            batch: list[_Item] = []
            turn = first
            while turn is not None:
                batch += turn
                try:
                    turn = pending.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit([line for line, _ in batch], [waiter for _, waiter in batch])
            if turn is None:
                return

    def _commit(self, lines: list[bytes], waiters: list[Waiter | None]) -> None:
        error = self._attempt(lambda: self._writer.write(lines))
        # A crash before this line loses events that nobody was told are durable.
        self._tell(waiters, sum(map(len, lines)), error)
        if error is None:
            self._attempt(lambda: self._writer.extend(lines))

    def _attempt(self, step: Callable[[], None]) -> AuditUnavailable | None:
        if self._failure is None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - whatever broke, the log has failed
                self._failure = AuditUnavailable(f"the audit log failed: {type(error).__name__}")
                self._context.run(self._report, error)
        return self._failure

    def _report(self, error: Exception) -> None:
        """Tell the operator, once: nothing is served from here on."""
        number = error.errno if isinstance(error, OSError) else None
        # The operational log may lie on the same full disk; waiters have to hear all the same.
        with suppress(OSError, ValueError):
            log.error(
                "audit.failed",
                error=type(error).__name__,
                reason=os.strerror(number) if number else "",
                path=str(self._directory),
                hint="calls are refused until a restart begins a new log",
            )

    def _tell(
        self, waiters: list[Waiter | None], size: int, error: AuditUnavailable | None
    ) -> None:
        def on_loop() -> None:
            self._pending_events -= len(waiters)
            self._pending_bytes -= size
            if error is None:
                self.durable_events += len(waiters)
            for waiter in waiters:
                if waiter is not None:
                    waiter(error)

        try:
            self._loop.call_soon_threadsafe(on_loop)
        except RuntimeError:
            pass  # the loop is closed: the process is ending and nobody waits any more


class _Writer:
    """The files of one log; belongs to the writer thread."""

    def __init__(self, directory: Path, origin: str, signer: Signer) -> None:
        self._directory = directory
        self._origin = origin
        self._signer = signer
        self._tree = Frontier()
        self._signed_size = 0
        self._unpublished = ""
        self.checkpoints = 0
        self._unsigned_since = 0.0
        (directory / "seg").mkdir(mode=0o700, parents=True)
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (directory / "vkey").write_text(signer.vkey + "\n")
        self._notes = _open_new(directory / "checkpoints.jsonl")
        self._segments = os.open(directory / "seg", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fd = self._open_segment()

    def _open_segment(self) -> int:
        path = self._directory / "seg" / f"{self._tree.size:020}.jsonl"
        fd = _open_new(path)
        self._path = path
        self._segment_bytes = 0
        # A crash before the folder is synced loses an empty file, never an acknowledged event.
        os.fsync(self._segments)
        os.fsync(self._lock)
        return fd

    def _next_segment(self) -> None:
        try:
            fd = self._open_segment()
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR:
                raise
            return  # this segment grows until the next commit finds a descriptor
        os.close(self._fd)
        self._fd = fd

    def write(self, lines: list[bytes]) -> None:
        """Make the lines durable."""
        data = b"\n".join(lines) + b"\n"
        _write_all(self._fd, data)
        os.fdatasync(self._fd)
        self._segment_bytes += len(data)
        self._check_in_place()

    def _check_in_place(self) -> None:
        """Notice a file that was removed or replaced under us: what we write would be nowhere."""
        ours, theirs = os.fstat(self._fd), os.stat(self._path)  # noqa: PTH116 - at every commit
        if ours.st_nlink == 0 or (ours.st_ino, ours.st_dev) != (theirs.st_ino, theirs.st_dev):
            raise FileNotFoundError(self._path.name)

    def extend(self, lines: list[bytes]) -> None:
        """Add durable lines to the tree; sign a checkpoint if one is due."""
        if self._signed_size == self._tree.size:
            self._unsigned_since = time.monotonic()  # noqa: TID251 - a pace, not an instant of record
        for line in lines:
            self._tree.append(line)
        if self._segment_bytes > MAX_SEGMENT_BYTES:
            self._next_segment()
        if (
            self._tree.size - self._signed_size >= CHECKPOINT_EVENTS
            or self.seconds_to_checkpoint() == 0
        ):
            self.checkpoint()

    def seconds_to_checkpoint(self) -> float | None:
        """Return how long until a checkpoint is due, None while everything is signed."""
        if self._signed_size == self._tree.size:
            return CHECKPOINT_SECONDS if self._unpublished else None
        passed = time.monotonic() - self._unsigned_since  # noqa: TID251 - a pace, not an instant
        return max(0.0, CHECKPOINT_SECONDS - passed)

    def checkpoint(self) -> None:
        """Sign the tree as it is; once it is, only make up for what could not be published."""
        if self._signed_size < self._tree.size:
            note = Checkpoint(self._origin, self._tree.size, self._tree.root()).sign(self._signer)
            _write_all(self._notes, json.dumps(note, ensure_ascii=False).encode() + b"\n")
            os.fdatasync(self._notes)
            self._signed_size = self._tree.size
            self.checkpoints += 1
            self._unpublished = note
        # A crash here leaves `checkpoint` behind `checkpoints.jsonl`; readers take the later.
        if self._unpublished:
            self._publish(self._unpublished)

    def _publish(self, note: str) -> None:
        """Put a note into `checkpoint`, whole or not at all."""
        temporary = self._directory / "checkpoint.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR:
                raise
            return  # the note is safe in the list; the copy is tried again with the next, or in time
        try:
            _write_all(fd, note.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(self._directory / "checkpoint")
        self._unpublished = ""

    def checkpoint_if_unsigned(self) -> None:
        """Sign the tree unless it is signed as it is."""
        if self._signed_size < self._tree.size:
            self.checkpoint()

    def close(self) -> None:
        """Sign what is unsigned and let go of the files."""
        self.checkpoint_if_unsigned()
        for fd in (self._fd, self._notes, self._segments):
            os.close(fd)
        if self._unpublished:
            self._publish(self._unpublished)  # now there are descriptors
        os.close(self._lock)


def _open_new(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
