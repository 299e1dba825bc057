"""Taking events out of logs so that what is left still verifies: by age, or one by one.

The word for it comes first, signed, in the anchor; then the events go. A crash between the two leaves
more than was allowed to go, which is no harm. Hashes stay: of a single event in its place, of a
beginning as the roots over it. The salt of each event keeps its hash from telling what it said.
A log that is still written is left alone.
"""

import base64
import os
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway.audit.anchor import Anchor
from gateway.audit.event import LogPruned, LogRedacted
from gateway.audit.files import REDACTED, Damaged, LogFiles, line_hash, redacted_line
from gateway.audit.recovery import RECOVERED, is_final, locked
from gateway.audit.tree import Frontier


class _Line(msgspec.Struct, gc=False):
    origin: str = ""
    ts: str = ""


def redact(log: Path, origin: str, events: Collection[int], reason: str, anchor: Anchor) -> None:
    """Erase single events of a log that nobody writes any more.

    Raises:
        Damaged: There are no such events.
        BlockingIOError: The log is still written, or another process is at the anchor.
        OSError: It cannot be written.
    """
    with locked([log]) as is_free:
        if not is_free:
            raise BlockingIOError("the log is still written")
        size = sum(1 for _ in LogFiles(log).lines())
        if not events or not all(0 <= index < size for index in events):
            raise Damaged(f"the log has {size} events")
        chosen = tuple(sorted(set(events)))
        anchor.append([LogRedacted(log=origin, events=chosen, reason=reason)])
        # A crash here: the events may go, and are still there.
        for first, path in LogFiles(log).segments():
            _rewrite(path, first, set(chosen))


def _rewrite(path: Path, first: int, events: set[int]) -> None:
    lines = path.read_bytes().split(b"\n")
    changed = False
    for at, line in enumerate(lines[:-1]):
        if first + at in events and not line.startswith(REDACTED):
            lines[at] = redacted_line(line_hash(line))
            changed = True
    if not changed:
        return
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(b"\n".join(lines))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def prune(log: Path, before: float, anchor: Anchor) -> int:
    """Erase the segments at a log's beginning whose events are all older than `before` (seconds).

    Return how many events went. The log must be final, and anchored as it is.

    Raises:
        Damaged: The log does not fit together.
        BlockingIOError: Another process is at the anchor.
        OSError: It cannot be written.
    """
    files = LogFiles(log)
    segments = files.segments()
    limit = datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    old: list[Path] = []
    size, origin = 0, ""
    for first, path in segments:
        lines = path.read_bytes().split(b"\n")[:-1]
        last = msgspec.json.decode(lines[-1], type=_Line) if lines else _Line(ts=" ")
        if not last.ts or last.ts >= limit:
            break
        old.append(path)
        size, origin = first + len(lines), last.origin or origin
    if not old or not origin:
        return 0
    frontier = Frontier.at(size, files.node)
    roots = tuple(base64.b64encode(root).decode() for root in frontier.roots)
    anchor.append([LogPruned(log=origin, size=size, frontier=roots, reason="retention")])
    if is_final(log):
        (log / RECOVERED).touch()  # its last words may be among those that go
    for path in old:
        path.unlink()
    return size - segments[0][0]
