"""The audit log of one process: durable first, then acknowledged.

`append` runs on the event loop and never blocks: it encodes the line and numbers it. What one turn of
the loop appended is handed over together at its end; one thread writes whatever has queued up with a
single write and a single fdatasync (group commit), tells the loop, then extends the Merkle tree and
signs a checkpoint when one is due (`gateway.audit.writer`).

Laws of this file:
- a waiter hears success only after its line is on the disk;
- after the first error nothing more is written to a log, every waiter hears of it, and every append
  raises: a log with a hole would be worse than a gateway that refuses;
- what follows is another log, which `renew` opens once that is possible, and which begins by saying
  where the one before it ended and how many events never reached it;
- a log belongs to one writer (flock) and is never reopened;
- what must still be said (the end of a call that began) is neither refused for a full queue nor for a
  disk on which only the reserve is left: room for it was taken when the log was opened.
"""

import asyncio
import contextvars
import os
import queue
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from gateway.audit.durability import Durability
from gateway.audit.envelope import Envelope
from gateway.audit.event import Event, LogGap, LogOpened, LogSealed
from gateway.audit.trust import LogKeys
from gateway.audit.writer import LogWriter
from gateway.clock import Clock
from gateway.errors import GatewayError
from gateway.telemetry.logs import get_log

MAX_EVENT_BYTES: Final = 65_535
"""The largest entry of a C2SP tlog-tiles bundle."""

MAX_PENDING_EVENTS: Final = 4096
"""As many as Tessera lets wait (its pushback); beyond it the disk is not keeping up."""

MAX_PENDING_BYTES: Final = 8 * 1024 * 1024

ANONYMOUS_SHARE: Final = 0.5
"""The part of both that records of unidentified callers may fill; the rest is kept for the others."""

END_BYTES: Final = 2048
"""Reserved on the disk for each call that may be under way: its end takes some 600 bytes."""

Waiter = Callable[["AuditUnavailable | None"], None]
_Item = tuple[bytes, Waiter | None]

log = get_log()


class AuditUnavailable(GatewayError):
    """A record cannot be made durable; nothing that needs it may happen."""

    code = "audit_unavailable"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPlace:
    """Where a process keeps its logs, and who vouches for them.

    `draw_keys` is asked for the keys of each log by its origin. `calls` is how many calls may be
    under way at once: for so many ends room is reserved.
    """

    directory: Path
    origin: str
    draw_keys: Callable[[str], LogKeys]
    calls: int = 0
    durability: Durability = Durability.STRICT


class Journal:
    """A process's log, and whatever follows it. All methods belong to the event loop's thread."""

    def __init__(self, place: JournalPlace, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self._place = place
        self._durable_before = 0
        self._clock = clock
        self._loop = loop
        # The writer's thread says whose log failed: what the operational log binds is the caller's.
        self._context = contextvars.copy_context()
        self._logs = 1
        self._begin(self._new(place.directory, place.origin))

    @classmethod
    def open(cls, place: JournalPlace, *, clock: Clock, loop: asyncio.AbstractEventLoop) -> Self:
        """Return a new log with its first event queued; its folder must not exist.

        Raises:
            OSError: The folder cannot be made or written.
        """
        return cls(place, clock, loop)

    @property
    def durable_events(self) -> int:
        """Return how many events this process has on the disk, in all of its logs."""
        return self._durable_before + self._log.durable

    @property
    def origin(self) -> str:
        """Return the origin of the log that takes events now."""
        return self._log.origin

    @property
    def has_failed(self) -> bool:
        """Whether the log takes no more events."""
        return self._log.failure is not None

    @property
    def is_short(self) -> bool:
        """Whether only what is reserved is left of the disk."""
        return self._log.writer.is_short

    @property
    def pending_events(self) -> int:
        """How many events are not durable yet."""
        return self._log.pending_events

    def append(self, event: Event, on_durable: Waiter | None = None) -> int:
        """Queue one event; return its index. `on_durable` runs on the loop, with None or the error.

        Raises:
            AuditUnavailable: The log has failed, is full, or cannot hold an event of this size.
        """
        return self._log.append(event, on_durable)

    def renew(self) -> bool:
        """Follow a log that has failed with a new one; return whether events are taken again."""
        before = self._log
        if before.failure is None:
            return True
        if before.pending_events:
            return False  # its waiters have not heard yet, and its thread has not ended
        self._logs += 1
        place = self._place
        directory = place.directory.with_name(f"{place.directory.name}.{self._logs}")
        try:
            new = self._new(directory, f"{place.origin}.{self._logs}")
        except OSError:
            # What was made of it was never written to; the next try has another name.
            shutil.rmtree(directory, ignore_errors=True)
            return False
        before.retire()
        self._durable_before += before.durable
        self._begin(new)
        self.append(
            LogGap(
                log=before.origin, durable=before.durable, lost=before.lost,
                reason=before.failure.args[0],
            )
        )  # fmt: skip
        log.warning("audit.renewed", path=str(directory), count=before.lost)
        return True

    def _new(self, directory: Path, origin: str) -> "_Log":
        return _Log(directory, origin, self._place, self._clock, self._loop, self._context)

    def _begin(self, new: "_Log") -> None:
        self._log = new
        keys = new.keys
        opened = LogOpened(
            vkey=keys.log.vkey, clock=keys.clock.vkey, durability=self._place.durability
        )
        new.append(opened, None)
        new.start()

    def close(self) -> None:
        """Write what is queued, seal the log and sign it. Blocks until it is on the disk."""
        self._log.close()


class _Log:
    """One log, its queue and its thread."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a log is made of
        self,
        directory: Path,
        origin: str,
        place: JournalPlace,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
    ) -> None:
        self.origin = origin
        self.failure: AuditUnavailable | None = None
        self.durable = 0
        self.lost = 0
        self.pending_events = 0
        self._pending_bytes = 0
        self._next = 0
        self._loop = loop
        self._clock = clock
        self._context = context
        self._envelope = Envelope(origin, clock)
        self.keys = place.draw_keys(origin)
        self.writer = LogWriter.create(
            directory,
            origin,
            self.keys.log.sign_note,
            stamp=lambda text: self.keys.clock.cosign(text, int(self._clock.now())),
            delegation=self.keys.delegation,
            reserve_bytes=place.calls * END_BYTES + MAX_PENDING_BYTES if place.calls else 0,
        )
        self._turn: list[_Item] = []
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def append(self, event: Event, on_durable: Waiter | None) -> int:
        if self.failure is not None:
            raise self.failure
        line = self._envelope.line(event, self._next)
        size = len(line)
        if size > MAX_EVENT_BYTES:
            raise AuditUnavailable("an event is larger than an entry may be")
        if not event.is_reserved:
            self._check_room(event)
        self.pending_events += 1
        self._pending_bytes += size
        index = self._next
        self._next = index + 1
        if not self._turn:
            # Waking the writer for every event would make it fight the loop for the interpreter.
            self._loop.call_soon(self._hand_over)
        self._turn.append((line, on_durable))
        return index

    def _check_room(self, event: Event) -> None:
        share = ANONYMOUS_SHARE if event.is_anonymous else 1
        if (
            self.pending_events >= MAX_PENDING_EVENTS * share
            or self._pending_bytes > MAX_PENDING_BYTES * share
        ):
            raise AuditUnavailable("the audit log does not keep up")
        if self.writer.is_short:
            raise AuditUnavailable("no room is left on the disk")

    def _hand_over(self) -> None:
        if self._turn:
            self._queue.put(self._turn)
            self._turn = []

    def close(self) -> None:
        self._hand_over()
        self._queue.put(None)
        self._thread.join()
        # The writer's files are this thread's now.
        writer = self.writer
        self._attempt(writer.checkpoint)
        if self.failure is None:
            line = self._envelope.line(LogSealed(checkpoints=writer.checkpoints), self._next)
            self._commit([line], [])
        self._attempt(writer.close)

    def retire(self) -> None:
        """End the thread of a log that has failed; its lock is kept until the process ends."""
        self._queue.put(None)
        self._thread.join()

    # --- the writer thread ---

    def _write(self) -> None:
        writer, pending = self.writer, self._queue
        while True:
            try:
                first = pending.get(timeout=writer.seconds_to_wait())
            except queue.Empty:
                self._attempt(writer.attend)
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
        error = self._attempt(lambda: self.writer.write(lines))
        # A crash before this line loses events that nobody was told are durable.
        self._tell(waiters, sum(map(len, lines)), error)
        if error is None:
            self._attempt(lambda: self.writer.extend(lines))

    def _attempt(self, step: Callable[[], None]) -> AuditUnavailable | None:
        if self.failure is None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - whatever broke, the log has failed
                self.failure = AuditUnavailable(f"the audit log failed: {type(error).__name__}")
                self._context.run(self._report, error)
        return self.failure

    def _report(self, error: Exception) -> None:
        """Tell the operator, once: nothing is served from here on."""
        number = error.errno if isinstance(error, OSError) else None
        # The operational log may lie on the same full disk; waiters have to hear all the same.
        with suppress(OSError, ValueError):
            log.error(
                "audit.failed",
                error=type(error).__name__,
                reason=os.strerror(number) if number else "",
                path=str(self.writer.path),
                hint="calls are refused until another log can be opened",
            )

    def _tell(
        self, waiters: list[Waiter | None], size: int, error: AuditUnavailable | None
    ) -> None:
        def on_loop() -> None:
            self.pending_events -= len(waiters)
            self._pending_bytes -= size
            if error is None:
                self.durable += len(waiters)
            else:
                self.lost += len(waiters)
            for waiter in waiters:
                if waiter is not None:
                    waiter(error)

        try:
            self._loop.call_soon_threadsafe(on_loop)
        except RuntimeError:
            pass  # the loop is closed: the process is ending and nobody waits any more
