"""The files of one audit log, as whoever writes it sees them. Blocks; belongs to one thread at a time.

Below the log's folder: `seg/<first index>.jsonl` (one event a line), `checkpoints.jsonl` (a signed note
for every growth, as a JSON string), `checkpoint` (the latest note; while nothing happens it is signed
anew, with the time, every minute), `delegation` (the deployment key's word for the log's keys) and
`tile/` (every whole tile of hashes, as C2SP tlog-tiles lays them out).

Laws of this file:
- an event is durable before anybody hears of it, and in the tree before it is signed;
- after the first failed write or sync nothing is written any more (fsyncgate: a failed fdatasync
  may not be tried again on the same descriptor);
- room for what must still be said is taken from the disk beforehand: when that fails the writer is
  `is_short` and goes on, and whoever feeds it must say only what cannot be left unsaid;
- what makes an event durable and signed needs no descriptor but those that are held from the start.
  What does need one, or needs room that was not reserved (a segment, a tile, the copy in `checkpoint`),
  waits or is left out: it can be made from the rest.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.files import Damaged, LogFiles
from gateway.audit.room import NO_ROOM, allocate
from gateway.audit.tiles import WIDTH, tile_path
from gateway.audit.tree import EMPTY_ROOT, Frontier, leaf_hash

CHECKPOINT_EVENTS: Final = 256
CHECKPOINT_SECONDS: Final = 1.0
"""A checkpoint is due after so many events, or so long after the first unsigned one."""

HEARTBEAT_SECONDS: Final = 60.0
"""How old the signed time of a log that lives may be (systemd's CVE-2023-31438: silence that nobody
signs lets a log be cut back unseen)."""

CHECK_SECONDS: Final = 1.0
"""How soon a removed or replaced file is noticed, and room looked for again, while nothing is written."""

MAX_SEGMENT_BYTES: Final = 64 * 1024 * 1024

STEP_BYTES: Final = 1024 * 1024
"""Room is taken in such steps, so that few commits ask the disk for it."""

NOTES_RESERVE_BYTES: Final = 1024 * 1024
"""More than two thousand checkpoints."""

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_LATER: Final = frozenset({errno.EMFILE, errno.ENFILE}) | NO_ROOM

Sign = Callable[[str], str]
"""Turns a checkpoint's text into its note, or into what stands below a note that is published."""


class LogWriter:
    """Appends to one log."""

    def __init__(  # noqa: PLR0913 - what a log is made of
        self,
        directory: Path,
        origin: str,
        sign: Sign,
        *,
        stamp: Sign,
        reserve_bytes: int,
        frontier: Frontier,
        leaves: list[bytes],
        nodes: dict[int, list[bytes]],
        segment: Path | None = None,
    ) -> None:
        self.is_short = False
        self.checkpoints = 0
        self.path = directory
        self._origin = origin
        self._sign = sign
        self._stamp = stamp
        self._reserve = reserve_bytes
        self._can_reserve = reserve_bytes > 0
        self._tree = frontier
        self._tree._joined = self._on_joined  # noqa: SLF001 - one structure in two files
        self._leaves = leaves
        self._nodes = nodes
        self._signed_size = frontier.size
        self._unsigned_since = 0.0
        self._published_at = 0.0
        self._unpublished = ""
        self._notes_room = 0
        with ExitStack() as opened:
            self._lock = _hold(os.open(directory, _FOLDER), opened)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._segments = _hold(os.open(directory / "seg", _FOLDER), opened)
            self._notes = _hold(_open(directory / "checkpoints.jsonl"), opened)
            self._begin_segment(segment)
            opened.pop_all()  # all could be opened: they are held until `close`

    @classmethod
    def create(  # noqa: PLR0913 - what a log is made of
        cls,
        directory: Path,
        origin: str,
        sign: Sign,
        *,
        stamp: Sign,
        delegation: str,
        reserve_bytes: int = 0,
    ) -> Self:
        """Begin a log at `directory`, which must not exist.

        Raises:
            OSError: It cannot be made.
        """
        (directory / "seg").mkdir(mode=0o700, parents=True)
        if delegation:
            with (directory / "delegation").open("x", encoding="utf-8") as file:
                file.write(delegation)
                file.flush()
                os.fsync(file.fileno())
        return cls(
            directory, origin, sign,
            stamp=stamp, reserve_bytes=reserve_bytes, frontier=Frontier(), leaves=[], nodes={},
        )  # fmt: skip

    @classmethod
    def resume(cls, directory: Path, origin: str, sign: Sign) -> Self:
        """Go on with a log that was closed, or whose writer died.

        Raises:
            Damaged: It is not what was signed last.
            BlockingIOError: Somebody else writes to it.
            OSError: It cannot be read or written.
        """
        files = LogFiles(directory)
        first, segment = files.segments()[-1]
        size = first + _cut_torn(segment)
        _cut_torn(directory / "checkpoints.jsonl")
        notes = files.notes()
        signed = Checkpoint.claimed_by(notes[-1]) if notes else Checkpoint(origin, 0, EMPTY_ROOT)
        if signed.size > size or Frontier.at(signed.size, files.node).root() != signed.root:
            raise Damaged(f"the first {signed.size} events are not those that were signed")
        writer = cls(
            directory, origin, sign,
            stamp=lambda _: "", reserve_bytes=0, frontier=Frontier.at(size, files.node),
            leaves=[files.node(0, at) for at in range(size - size % WIDTH, size)],
            nodes={
                row: [files.node(8 * row, at) for at in range(whole - whole % WIDTH, whole)]
                for row in range(1, 8) if (whole := size >> 8 * row)
            },
            segment=segment,
        )  # fmt: skip
        writer.checkpoints = len(notes)
        writer._signed_size = signed.size
        return writer

    # --- writing ---

    @property
    def size(self) -> int:
        """Return how many events are in the tree."""
        return self._tree.size

    @property
    def is_signed(self) -> bool:
        """Whether every event in the tree is under a checkpoint."""
        return self._signed_size == self._tree.size

    def write(self, lines: list[bytes]) -> None:
        """Make the lines durable."""
        data = b"\n".join(lines) + b"\n"
        self._make_room(len(data))
        _write_all(self._fd, data)
        os.fdatasync(self._fd)
        self._segment_bytes += len(data)
        self._check_in_place()

    def _check_in_place(self) -> None:
        """Notice a file that was removed or replaced under us: what we write would be nowhere."""
        ours, theirs = os.fstat(self._fd), os.stat(self._segment)  # noqa: PTH116 - at every commit
        if ours.st_nlink == 0 or (ours.st_ino, ours.st_dev) != (theirs.st_ino, theirs.st_dev):
            raise FileNotFoundError(self._segment.name)

    def extend(self, lines: list[bytes]) -> None:
        """Add durable lines to the tree; sign a checkpoint if one is due."""
        if self.is_signed:
            self._unsigned_since = time.monotonic()  # noqa: TID251 - a pace, not an instant of record
        for line in lines:
            leaf = leaf_hash(line)
            self._tree.append_hash(leaf)
            self._leaves.append(leaf)
            if len(self._leaves) == WIDTH:
                self._write_tile(0, self._tree.size // WIDTH - 1, self._leaves)
                self._leaves = []
        if self._segment_bytes > MAX_SEGMENT_BYTES:
            self._next_segment()
        if (
            self._tree.size - self._signed_size >= CHECKPOINT_EVENTS
            or self._unsigned_since + CHECKPOINT_SECONDS <= time.monotonic()  # noqa: TID251 - a pace
        ):
            self.checkpoint()

    def _on_joined(self, level: int, node: bytes) -> None:
        """Collect the roots of whole tiles; 256 of them are a tile of the level above."""
        row = self._nodes.setdefault(level // 8, [])
        row.append(node)
        if len(row) == WIDTH:
            # The joining leaf is counted after it has joined.
            index = (self._tree.size + 1 >> level) // WIDTH - 1
            self._write_tile(level // 8, index, row)
            self._nodes[level // 8] = []

    def _write_tile(self, level: int, index: int, hashes: list[bytes]) -> None:
        """Keep a whole tile, unsynced: what is missing of it is made again from the events."""
        path = self.path / tile_path(level, index)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(b"".join(hashes))
        except OSError as error:
            if error.errno not in _LATER:
                raise
            path.unlink(missing_ok=True)

    # --- signing ---

    def seconds_to_wait(self) -> float:
        """Return how long until `attend` has something to do."""
        if self.is_signed:
            return CHECK_SECONDS
        passed = time.monotonic() - self._unsigned_since  # noqa: TID251 - a pace, not an instant
        return min(CHECK_SECONDS, max(0.0, CHECKPOINT_SECONDS - passed))

    def attend(self) -> None:
        """Do what is due though nothing was written."""
        self._check_in_place()
        if self.is_short:
            self._make_room(0)
        now = time.monotonic()  # noqa: TID251 - a pace, not an instant of record
        if not self.is_signed:
            if now - self._unsigned_since >= CHECKPOINT_SECONDS:
                self.checkpoint()
        elif self._unpublished:
            self._publish(self._unpublished)
        elif now - self._published_at >= HEARTBEAT_SECONDS:
            text = self._text()
            self._publish(self._sign(text) + self._stamp(text))

    def checkpoint(self) -> None:
        """Sign the tree as it is; once it is, only make up for what could not be published."""
        if not self.is_signed:
            text = self._text()
            note = self._sign(text)
            _write_all(self._notes, json.dumps(note, ensure_ascii=False).encode() + b"\n")
            os.fdatasync(self._notes)
            self._signed_size = self._tree.size
            self.checkpoints += 1
            self._unpublished = note + self._stamp(text)
        # A crash here leaves `checkpoint` behind `checkpoints.jsonl`; readers take the later.
        if self._unpublished:
            self._publish(self._unpublished)

    def _text(self) -> str:
        return Checkpoint(self._origin, self._tree.size, self._tree.root()).to_text()

    def _publish(self, note: str) -> None:
        """Put a note into `checkpoint`, whole or not at all."""
        temporary = self.path / "checkpoint.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write_all(fd, note.encode())
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in _LATER:
                raise
            return  # the note is safe in the list; the copy is tried again with the next, or in time
        temporary.replace(self.path / "checkpoint")
        self._published_at = time.monotonic()  # noqa: TID251 - a pace, not an instant of record
        self._unpublished = ""

    # --- segments and room ---

    def _begin_segment(self, existing: Path | None = None) -> None:
        path = existing or self.path / "seg" / f"{self._tree.size:020}.jsonl"
        self._fd = _open(path, is_new=existing is None)
        self._segment = path
        self._segment_bytes = os.fstat(self._fd).st_size
        self._room = 0
        # A crash before the folder is synced loses an empty file, never an acknowledged event.
        os.fsync(self._segments)
        os.fsync(self._lock)
        self._make_room(0)

    def _next_segment(self) -> None:
        before = self._fd, self._segment_bytes
        try:
            self._begin_segment()
        except OSError as error:
            if error.errno not in _LATER:
                raise
            return  # this segment grows until the next commit finds a descriptor
        fd, length = before
        os.ftruncate(fd, length)  # gives back the room that was reserved
        os.close(fd)

    def _make_room(self, length: int) -> None:
        """Hold the reserve beyond what is about to be written; where there is none, say so."""
        needed = self._segment_bytes + length + self._reserve
        if not self._can_reserve or (needed <= self._room and not self.is_short):
            return
        try:
            self._can_reserve = allocate(
                self._fd, self._room, max(0, needed - self._room) + STEP_BYTES
            )
            self._can_reserve = self._can_reserve and allocate(
                self._notes, 0, self._notes_room + NOTES_RESERVE_BYTES
            )
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.is_short = True
            return
        self._room = max(needed, self._room) + STEP_BYTES
        self._notes_room = os.fstat(self._notes).st_size
        self.is_short = False

    # --- the end ---

    def close(self) -> None:
        """Sign what is unsigned and let go of the files."""
        self.checkpoint()
        if self._can_reserve:
            for fd in (self._fd, self._notes):
                os.ftruncate(fd, os.fstat(fd).st_size)  # gives back what was reserved
        for fd in (self._fd, self._notes, self._segments):
            os.close(fd)
        if self._unpublished:
            self._publish(self._unpublished)  # now there are descriptors
        os.close(self._lock)


def _hold(fd: int, opened: ExitStack) -> int:
    opened.callback(os.close, fd)
    return fd


def _cut_torn(path: Path) -> int:
    """Cut off a last line that was never acknowledged; return how many whole ones there are."""
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
    return data.count(b"\n")


def _open(path: Path, *, is_new: bool = False) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    return os.open(path, flags | (os.O_EXCL if is_new else 0), 0o600)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
