"""What is made of the logs of a process that died: what was found is said in the log of one that lives.

A dead log is not changed. Its whole events, signed or not, are read once more; how many there are, their
root, and how many bytes of a last line never became an event, are an event of the recovering log, and so
is every call that began there and did not end. So its tail is signed after all, by somebody else.
A log is dead when it is not sealed and nobody holds its lock. A process that opened several, one after
the other, holds the locks of all.
"""

import base64
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from gateway.audit.event import CallUnclosed, Event, LogRecovered
from gateway.audit.files import LogFiles, line_hash
from gateway.audit.tree import Frontier
from gateway.audit.trust import Delegated
from keys.signing import Verifier

RECOVERED: Final = "recovered"
"""Marks a log that needs no second recovery; a convenience, and no evidence."""

_NAME: Final = re.compile(r"(?P<process>.+-[a-z]+(?:-\d+)?\.\d+)(?:\.(?P<number>\d+))?")


class _Line(msgspec.Struct, gc=False):
    type: str = ""  # an erased event has none
    call: str = ""
    tenant: str = ""


def logs_by_process(directory: Path) -> Iterator[list[Path]]:
    """Return the folders of each process's logs, in the order in which it opened them."""
    processes: dict[str, list[tuple[int, Path]]] = {}
    for path in directory.iterdir():
        if name := _NAME.fullmatch(path.name):
            numbered = int(name["number"] or 1), path
            processes.setdefault(name["process"], []).append(numbered)
    for logs in processes.values():
        yield [path for _, path in sorted(logs)]


def is_final(log: Path) -> bool:
    """Return whether nothing will be added to a log any more, by its own account or its finder's."""
    if (log / RECOVERED).exists():
        return True
    segments = LogFiles(log).segments()
    if not segments:
        return False
    with segments[-1][1].open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
        end = file.read()
    return end.endswith(b"\n") and b'"type":"log.sealed"' in end.splitlines()[-1]


@contextmanager
def locked(logs: list[Path]) -> Iterator[bool]:
    """Hold the locks of some logs; say whether nobody else did."""
    fds: list[int] = []
    try:
        for log in logs:
            fds.append(os.open(log, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            try:
                fcntl.flock(fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        yield True
    finally:
        for fd in fds:
            os.close(fd)


def recover(logs: list[Path], deployment: Verifier) -> list[Event]:
    """Return what is to be said of the logs of one dead process; its locks must be held.

    Raises:
        BadSignature, MalformedPolicy: A log is not this deployment's.
        Damaged, OSError: A log cannot be read.
    """
    found: list[LogRecovered] = []
    open_calls: dict[str, CallUnclosed] = {}
    decode = msgspec.json.Decoder(_Line).decode
    for log in logs:
        delegation = (log / "delegation").read_text(encoding="utf-8")
        origin = Delegated.from_note(delegation, deployment).log.name
        tree, torn = Frontier(), 0
        for index, data in _lines(log):
            if not data.endswith(b"\n"):
                torn = len(data)
                break
            tree.append_hash(line_hash(data[:-1]))
            line = decode(data)
            if line.type == "call.start":
                open_calls[line.call] = CallUnclosed(
                    call=line.call, tenant=line.tenant, log=origin, start=index
                )
            elif line.type == "call.end":
                open_calls.pop(line.call, None)
        if not is_final(log):
            root = base64.b64encode(tree.root()).decode()
            found.append(LogRecovered(log=origin, size=tree.size, root=root, torn=torn))
    return [*open_calls.values(), *found]


def _lines(log: Path) -> Iterator[tuple[int, bytes]]:
    for first, path in LogFiles(log).segments():
        with path.open("rb") as file:
            yield from enumerate(file, first)


def is_empty_ruin(log: Path) -> bool:
    """Return whether a folder is what a crash left before anything could be recorded in it."""
    return not (log / "delegation").exists() and not any(
        path.stat().st_size for _, path in LogFiles(log).segments()
    )
