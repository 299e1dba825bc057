"""Reading what was recorded: all logs of a folder or a tarball, event by event, and one call in them."""

import json
import mmap
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.files import REDACTED, Damaged, LogFiles
from gateway.audit.proof import EventProof
from gateway.audit.tree import inclusion_proof

CALL_ID: Final = re.compile(r"[0-9a-f]{32}")
"""Twelve digits are the milliseconds at which the call came (`gateway.execution`)."""

SLACK_SECONDS: Final = 60.0
"""How far the clock of a file system may be off."""


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Yield the folder at `path`, or what a tarball there holds.

    Raises:
        OSError, tarfile.TarError: It cannot be read.
    """
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="veklom-audit-") as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def find_logs(path: Path) -> list[Path]:
    """Return the folder of every log at or below `path`."""
    return sorted({found.parent for found in [path / "seg", *path.rglob("seg")] if found.is_dir()})


@dataclass(frozen=True, slots=True)
class Entry:
    """One event where it stands."""

    index: int
    line: bytes
    fields: dict[str, Any]


def entries(path: Path) -> Iterator[Entry]:
    """Return every event below `path` that was not erased, log by log."""
    for log in find_logs(path):
        for index, line in LogFiles(log).lines():
            if not line.startswith(REDACTED):
                yield Entry(index, line, json.loads(line))


def find_call(path: Path, call: str) -> list[tuple[Path, Entry]]:
    """Return the events of one call, in order, each with its log's folder."""
    began = int(call[:12], 16) / 1000
    needle = b'"call":"%b"' % call.encode()
    found: list[tuple[Path, Entry]] = []
    for log in find_logs(path):
        for _, segment in LogFiles(log).segments():
            stat = segment.stat()
            if stat.st_size and stat.st_mtime >= began - SLACK_SECONDS:
                found += [(log, entry) for entry in _search(segment, needle)]
    return sorted(found, key=lambda each: str(each[1].fields["ts"]))


def _search(segment: Path, needle: bytes) -> Iterator[Entry]:
    with segment.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(needle)
        while at >= 0:
            begin, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
            if end < 0:
                return  # it is being written
            line = data[begin:end]
            fields = json.loads(line)
            # The needle may stand in a text; the field itself decides.
            if b'"%b"' % str(fields.get("call", "")).encode() == needle.partition(b":")[2]:
                yield Entry(int(fields["seq"]), line, fields)
            at = data.find(needle, end)


def prove(log: Path, entry: Entry) -> EventProof | None:
    """Return the proof of one event of a log, None while no checkpoint is above it.

    Raises:
        Damaged: The log does not fit together.
    """
    files = LogFiles(log)
    note = (files.read("checkpoint") or b"").decode()
    delegation = (files.read("delegation") or b"").decode()
    if not note:
        return None
    size = Checkpoint.claimed_by(note).size
    if entry.index >= size:
        return None
    try:
        hashes = inclusion_proof(entry.index, size, files.node)
    except IndexError:
        raise Damaged(f"the log has fewer events than the {size} that were signed") from None
    return EventProof(
        index=entry.index,
        hashes=tuple(hashes),
        note=note,
        event=entry.line.decode(),
        delegation=delegation,
    )
