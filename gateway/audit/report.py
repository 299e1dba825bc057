"""What a verification found, for people and for programs. No I/O."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import msgspec


class ExitCode(IntEnum):
    """What `veklom audit verify` ends with."""

    VERIFIED = 0
    TAMPERED = 1
    INCOMPLETE = 2
    USAGE = 3


@dataclass(slots=True)
class LogReport:
    """What was found in one log. Any finding means tampering; a gap means that it is not whole.

    `evidence` holds signed notes that contradict each other, or what the log says.
    """

    path: str
    origin: str = ""
    events: int = 0
    begin: int = 0
    erased: int = 0
    pruned: int = 0
    checkpoints: int = 0
    started: int = 0
    ended: int = 0
    open: int = 0
    unclosed: int = 0
    denied: int = 0
    counted: int = 0
    lost: int = 0
    is_sealed: bool = False
    signed_at: int = 0
    findings: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """Return the verdict on this log."""
        if self.findings:
            return ExitCode.TAMPERED
        return ExitCode.INCOMPLETE if self.gaps else ExitCode.VERIFIED

    def to_lines(self) -> Iterator[str]:
        """Return what a person reads about this log."""
        state = "sealed" if self.is_sealed else "not sealed"
        yield f"Log      {self.origin or self.path}: {self.events} events, {state}"
        if self.begin:
            yield f"  resumed     from event {self.begin}, by a trusted checkpoint"
        if self.erased or self.pruned:
            yield f"  erased      {self.erased} single events, {self.pruned} at the beginning"
        yield f"  checkpoints {self.checkpoints} signed"
        yield f"  calls       {self.started} started, {self.ended} ended, {self.denied} denied" + (
            f", {self.open} without an end" if self.open else ""
        )
        if self.unclosed:
            yield f"  unclosed    {self.unclosed} calls of a dead process"
        if self.counted:
            yield f"  refusals    {self.counted} of unidentified callers, counted by code"
        if self.lost:
            yield f"  lost        {self.lost} events, by the log's own account"
        yield from (f"  TAMPERED    {finding}" for finding in self.findings)
        yield from (f"  INCOMPLETE  {gap}" for gap in self.gaps)
        for note in self.evidence:
            yield "  evidence:"
            yield from (f"    {line}" for line in note.splitlines())


@dataclass(slots=True)
class Report:
    """What was found in every log below a directory, and between them."""

    key: str
    key_is_trusted: bool
    logs: list[LogReport]
    anchor: str = ""
    witnesses: tuple[str, ...] = ()
    findings: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """Return the worst verdict; a directory without a log is no evidence of anything."""
        codes = [log.exit_code for log in self.logs]
        if self.findings or ExitCode.TAMPERED in codes:
            return ExitCode.TAMPERED
        if self.gaps or not codes:
            return ExitCode.INCOMPLETE
        return max(codes)

    def to_lines(self) -> Iterator[str]:
        """Return the report for a person."""
        source = "given" if self.key_is_trusted else "the log's own claim; pass --key to pin it"
        yield f"Key      {self.key} ({source})"
        for log in self.logs:
            yield from log.to_lines()
        if not self.logs:
            yield "No log was found."
        if self.anchor:
            yield f"Anchor   {self.anchor}"
        if self.witnesses:
            yield f"Cosigned {', '.join(self.witnesses)}"
        yield from (f"TAMPERED   {finding}" for finding in self.findings)
        yield from (f"INCOMPLETE {gap}" for gap in self.gaps)
        for note in self.evidence:
            yield "evidence:"
            yield from (f"  {line}" for line in note.splitlines())
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
                "anchor": self.anchor,
                "witnesses": self.witnesses,
                "findings": self.findings,
                "gaps": self.gaps,
                "evidence": self.evidence,
                "logs": logs,
            }
        )
