"""Verifying a log without trusting who wrote it: bytes, order, tree, signatures, and the calls.

What is checked, for each log below a directory:
- every line is one event whose `seq` is its index and whose `origin` is the log's;
- every checkpoint is signed by the trusted key, in canonical form, for this origin, with sizes that
  grow, and its root is that of the lines before it, byte for byte;
- `checkpoint` is the last of `checkpoints.jsonl`, and no checkpoint was taken out of a sealed log;
- there are at least as many events as were signed, in a folder that bears any mark of a log;
- every call that ended had started, once.
What no local check can see is a log cut back together with its checkpoints, or removed whole: that
takes a witness who remembers.

The functions that verify take lines and notes; only `verify_path` and `_read_log` touch files.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import msgspec

from gateway.audit.checkpoint import Checkpoint, MalformedCheckpoint
from gateway.audit.tree import Frontier
from keys.signing import BadSignature, Verifier


class ExitCode(IntEnum):
    """What `veklom audit verify` ends with."""

    VERIFIED = 0
    TAMPERED = 1
    INCOMPLETE = 2
    USAGE = 3


_MARKS = ("seg", "checkpoint", "checkpoints.jsonl")


class _Line(msgspec.Struct):
    """The part of an event that verification reads."""

    v: int
    origin: str
    ts: str
    seq: int
    salt: str
    type: str
    call: str = ""
    checkpoints: int = 0
    total: int = 0


@dataclass(slots=True)
class LogReport:
    """What was found in one log. Any finding means tampering; a gap means that it is not whole."""

    path: str
    origin: str = ""
    events: int = 0
    checkpoints: int = 0
    started: int = 0
    ended: int = 0
    denied: int = 0
    counted: int = 0
    is_sealed: bool = False
    findings: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """Return the verdict on this log."""
        if self.findings:
            return ExitCode.TAMPERED
        return ExitCode.INCOMPLETE if self.gaps else ExitCode.VERIFIED


@dataclass(slots=True)
class Report:
    """What was found in every log below a directory."""

    key: str
    key_is_trusted: bool
    logs: list[LogReport]

    @property
    def exit_code(self) -> ExitCode:
        """Return the worst verdict; a directory without a log is no evidence of anything."""
        codes = [log.exit_code for log in self.logs]
        if not codes:
            return ExitCode.INCOMPLETE
        return ExitCode.TAMPERED if ExitCode.TAMPERED in codes else max(codes)

    def to_lines(self) -> Iterator[str]:
        """Return the report for a person."""
        source = "given" if self.key_is_trusted else "the log's own claim; pass --key to pin it"
        yield f"Key      {self.key} ({source})"
        for log in self.logs:
            state = "sealed" if log.is_sealed else "not sealed"
            yield f"Log      {log.origin or log.path}: {log.events} events, {state}"
            yield f"  checkpoints {log.checkpoints} signed"
            open_calls = log.started - log.ended
            yield (
                f"  calls       {log.started} started, {log.ended} ended, {log.denied} denied"
                + (f", {open_calls} without an end" if open_calls else "")
            )
            if log.counted:
                yield f"  refusals    {log.counted} of unidentified callers, counted by code"
            yield from (f"  TAMPERED    {finding}" for finding in log.findings)
            yield from (f"  INCOMPLETE  {gap}" for gap in log.gaps)
        if not self.logs:
            yield "No log was found."
        yield f"RESULT   {self.exit_code.name}"

    def to_json(self) -> bytes:
        """Return the report for a program."""
        logs = [
            {**msgspec.to_builtins(log), "verdict": log.exit_code.name.lower()} for log in self.logs
        ]
        return msgspec.json.encode(
            {
                "key": self.key,
                "key_is_trusted": self.key_is_trusted,
                "verdict": self.exit_code.name.lower(),
                "logs": logs,
            }
        )


def verify_path(path: Path, vkey: str | None = None) -> Report:
    """Return what is found in the log at `path`, or in every log below it.

    Without `vkey` the key is taken from the `vkey` file beside the logs.

    Raises:
        ValueError: No key was given and none lies there, or it is no key.
        OSError: The path cannot be read.
    """
    directories = _find_logs(path)
    trusted = vkey is not None
    if vkey is None:
        beside = [path / "vkey", path.parent / "vkey"]
        found = next((each for each in beside if each.is_file()), None)
        if found is None:
            raise ValueError(f"no key was given and there is none at {path / 'vkey'}")
        vkey = _ascii(found.read_bytes())
    verifier = Verifier.from_vkey(vkey)
    if not path.is_dir():
        raise NotADirectoryError(str(path))
    return Report(vkey.strip(), trusted, [_read_log(each, verifier) for each in directories])


def _find_logs(path: Path) -> list[Path]:
    """Return every folder at or below `path` with a trace of a log: what was removed is missed."""
    logs: set[Path] = set()
    keys: set[Path] = set()
    for found in path.rglob("*"):
        if found.name in _MARKS:
            logs.add(found.parent)
        elif found.name == "vkey" and found.parent != path:
            keys.add(found.parent)
    # The key that auditors pin lies beside logs, not in one.
    beside = {log.parent for log in logs}
    return sorted(logs | keys - beside)


def _ascii(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError("not a verification key") from None


def _read_log(directory: Path, verifier: Verifier) -> LogReport:
    report = LogReport(directory.name)
    claimed, notes, latest_note = (
        _read(directory / name) for name in ("vkey", "checkpoints.jsonl", "checkpoint")
    )
    if claimed is None:
        report.gaps.append("vkey is missing")
    elif not _is_key(claimed, verifier):
        report.findings.append("the log names another key than the trusted one, or none")
    if notes is None:
        report.gaps.append("checkpoints.jsonl is missing")
    checkpoints = list(_checkpoints(notes or b"", latest_note, verifier, report))
    if not report.findings:
        verify_lines(_lines(directory, report), checkpoints, report)
    return report


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _is_key(claimed: bytes, verifier: Verifier) -> bool:
    try:
        named = Verifier.from_vkey(_ascii(claimed))
    except ValueError:
        return False
    is_whole = claimed.count(b"\n") == 1 and claimed.endswith(b"\n")
    return is_whole and named.public == verifier.public


def _checkpoints(
    notes: bytes, latest_note: bytes | None, verifier: Verifier, report: LogReport
) -> Iterator[Checkpoint]:
    """Return the checkpoints in the order of their sizes, noting what is wrong with them."""
    lines = notes.split(b"\n")
    torn = lines.pop()
    if torn:
        report.gaps.append("the last checkpoint was not written to its end")
    size = -1
    note = ""
    for number, line in enumerate(lines, 1):
        try:
            note = json.loads(line)
            if not isinstance(note, str) or json.dumps(note, ensure_ascii=False).encode() != line:
                raise ValueError("not the one spelling of a note")
            checkpoint = Checkpoint.from_note(note, verifier)
        except (BadSignature, MalformedCheckpoint, ValueError) as error:
            report.findings.append(f"checkpoint {number}: {error}")
            return
        if checkpoint.size <= size:
            report.findings.append(f"checkpoint {number}: size {checkpoint.size} does not grow")
            return
        if report.origin and checkpoint.origin != report.origin:
            report.findings.append(f"checkpoint {number} is of another log")
            return
        report.origin = checkpoint.origin
        size = checkpoint.size
        report.checkpoints += 1
        yield checkpoint
    _check_latest(lines, latest_note, report)


def _check_latest(lines: Sequence[bytes], latest_note: bytes | None, report: LogReport) -> None:
    """Compare `checkpoint` with the list, which is written first and never shortened."""
    if latest_note is None:
        if lines:
            report.gaps.append("checkpoint is missing")
        return
    latest = json.dumps(latest_note.decode(errors="replace"), ensure_ascii=False).encode()
    if latest not in lines:
        report.findings.append("`checkpoint` is not in the list of checkpoints")
    elif latest != lines[-1]:
        report.gaps.append(
            "`checkpoint` is behind the list: the writer was stopped between the two"
        )


def _lines(directory: Path, report: LogReport) -> Iterator[bytes]:
    """Return the log's lines without their line feeds, segment by segment."""
    index = 0
    folder = directory / "seg"
    if not folder.is_dir():
        report.gaps.append("seg is missing")
        return
    segments = sorted(folder.iterdir())
    for position, segment in enumerate(segments):
        if segment.name != f"{index:020}.jsonl":
            report.findings.append(f"segment {segment.name} does not begin at event {index}")
            return
        with segment.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    if position + 1 < len(segments):
                        report.findings.append(f"segment {segment.name} is cut short")
                    else:
                        report.gaps.append("the last event was not written to its end")
                    return
                index += 1
                yield line[:-1]


def verify_lines(
    lines: Iterable[bytes], checkpoints: Sequence[Checkpoint], report: LogReport
) -> None:
    """Check the lines against the checkpoints and themselves; note it all in `report`."""
    decoder = msgspec.json.Decoder(_Line)
    tree = Frontier()
    due = iter(checkpoints)
    expected = next(due, None)
    open_calls: set[str] = set()
    last: _Line | None = None
    for data in lines:
        tree.append(data)
        try:
            line = decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            report.findings.append(f"event {tree.size - 1} is not an event")
            return
        if line.seq != tree.size - 1 or (report.origin and line.origin != report.origin):
            report.findings.append(f"event {tree.size - 1} says it is {line.seq} of {line.origin}")
            return
        if last is not None and last.type == "log.sealed":
            report.findings.append(f"event {line.seq} comes after the log was sealed")
            return
        last = line
        _count(line, open_calls, report)
        if report.findings:
            return
        if expected is not None and tree.size == expected.size:
            if tree.root() != expected.root:
                report.findings.append(
                    f"the first {tree.size} events are not those that were signed"
                )
                return
            expected = next(due, None)
    report.events = tree.size
    report.is_sealed = last is not None and last.type == "log.sealed"
    if report.findings:
        return
    if expected is not None:
        report.findings.append(f"{expected.size} events were signed, {tree.size} are there")
        return
    _check_end(tree.size, checkpoints, last, report)


def _check_end(
    size: int, checkpoints: Sequence[Checkpoint], last: _Line | None, report: LogReport
) -> None:
    """Note what is missing at the end of a log of `size` events."""
    signed = checkpoints[-1].size if checkpoints else 0
    if report.is_sealed and last is not None:
        # A crash just before the last checkpoint leaves the seal itself unsigned.
        written = last.checkpoints + (size == signed)
        if written != len(checkpoints):
            report.findings.append(
                f"{written} checkpoints were written, {len(checkpoints)} are there"
            )
    if size > signed:
        report.gaps.append(f"the last {size - signed} events are not signed")


def _count(line: _Line, open_calls: set[str], report: LogReport) -> None:
    match line.type:
        case "call.start":
            report.started += 1
            if line.call in open_calls:
                report.findings.append(f"event {line.seq}: call {line.call} started twice")
            open_calls.add(line.call)
        case "call.end":
            report.ended += 1
            if line.call not in open_calls:
                report.findings.append(f"event {line.seq}: call {line.call} ended unbegun")
            open_calls.discard(line.call)
        case "call.denied":
            report.denied += 1
        case "refusals.counted":
            report.counted += line.total
        case _:
            pass
