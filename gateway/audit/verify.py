"""Verifying logs without trusting who wrote them: bytes, order, tree, signatures, and the calls.

What is checked, for each log below a directory:
- its keys are those for which the deployment key vouches;
- every line is one event whose `seq` is its index and whose `origin` is the log's;
- every checkpoint is signed, in canonical form, for this origin, with sizes that grow, and its root is
  that of the lines before it, byte for byte;
- `checkpoint` is the last of `checkpoints.jsonl`, and no checkpoint was taken out of a sealed log;
- there are at least as many events as were signed, in a folder that bears any mark of a log;
- every call that ended had started, once.
And between them:
- every log that the anchor log names is there, and says what it said when it was anchored;
- what is left of a log whose writer died is what was found of it then;
- what was erased was erased by a signed word for it.
A whole deployment that was cut back, anchor and all, is seen by whoever holds a later checkpoint of the
anchor: a witness, or the verifier itself (`trusted`).

The memory this takes does not grow with the events: it grows with the calls that are under way at once,
and with the number of logs.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from gateway.audit.checkpoint import Checkpoint, MalformedCheckpoint
from gateway.audit.files import REDACTED, Damaged, LogFiles, redacted_hash
from gateway.audit.report import ExitCode, LogReport, Report
from gateway.audit.tree import Frontier
from gateway.audit.trust import Delegated, MalformedPolicy, Policy
from keys.signing import BadSignature, Note, Verifier

__all__ = ["ExitCode", "Trust", "deployment_of", "verify_path"]

ANCHOR: Final = "anchor"
"""The folder of the deployment's log of logs; its checkpoints are signed by the deployment key."""

_MARKS: Final = ("seg", "checkpoint", "checkpoints.jsonl", "delegation")


class _Line(msgspec.Struct, gc=False):
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
    lost: int = 0
    durable: int = 0
    log: str = ""
    size: int = 0
    root: str = ""
    torn: int = 0
    note: str = ""
    events: tuple[int, ...] = ()
    frontier: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What the verifier brings along.

    `deployment` is the pinned key; `policy` names witnesses that must have seen the anchor; `trusted`
    are checkpoints that were verified before, by origin; `not_before` is the oldest time that the
    last signature of a log that still lives may bear.
    """

    deployment: Verifier
    is_given: bool
    policy: Policy | None = None
    trusted: Mapping[str, str] = field(default_factory=dict)
    not_before: int = 0


@dataclass(slots=True)
class _Said:
    """What logs say about each other."""

    anchored: dict[str, dict[int, str]] = field(default_factory=dict)
    recovered: dict[str, _Line] = field(default_factory=dict)
    redacted: dict[str, set[int]] = field(default_factory=dict)
    pruned: dict[str, _Line] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    open_calls: dict[str, str] = field(default_factory=dict)
    unbegun: dict[str, str] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Tail:
    """The end of a log, which its writer's death may explain."""

    root: bytes = b""
    torn: int = 0
    gaps: list[str] = field(default_factory=list)


def verify_path(path: Path, key: str | None = None, trust: Trust | None = None) -> Report:
    """Verify the log at `path`, or every log below it; `key` is a vkey that is trusted.

    Raises:
        ValueError: The key is malformed.
        OSError: Nothing can be read there, or no key is given and none is found.
    """
    if not path.is_dir():
        raise NotADirectoryError(str(path))
    trust = trust or Trust(deployment=deployment_of(path, key), is_given=key is not None)
    run = _Run(trust)
    for directory in _find_logs(path):
        run.read(directory)
    return run.conclude()


def deployment_of(path: Path, key: str | None) -> Verifier:
    """Return the deployment's key: the given one, or the claim that lies beside the logs.

    Raises:
        ValueError: The key is malformed.
        FileNotFoundError: None is given and none is found.
    """
    if key is not None:
        return Verifier.from_vkey(key)
    for claim in (
        path / "vkey",
        path.parent / "vkey",
        *path.glob("*/vkey"),
        *path.glob("*/*/vkey"),
    ):
        if claim.is_file():
            try:
                return Verifier.from_vkey(claim.read_text(encoding="ascii"))
            except UnicodeDecodeError:
                raise ValueError("not a verification key") from None
    raise FileNotFoundError(f"no key is given, and there is no {path / 'vkey'}")


def _find_logs(path: Path) -> list[Path]:
    """Return every folder at or below `path` with a trace of a log, the anchor first."""
    logs = {found.parent for mark in _MARKS for found in path.rglob(mark)}
    if any((path / mark).exists() for mark in _MARKS):
        logs.add(path)
    return sorted(logs, key=lambda log: (log.name != ANCHOR, str(log)))


class _Run:
    """One verification of a whole deployment."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._said = _Said()
        self._tails: dict[str, _Tail] = {}
        self._report = Report(trust.deployment.vkey, trust.is_given, [])

    def read(self, directory: Path) -> None:
        """Verify one log."""
        report = LogReport(directory.name)
        self._report.logs.append(report)
        check = _LogCheck(LogFiles(directory), report, self._trust, self._said)
        check.run(is_anchor=directory.name == ANCHOR)
        if directory.name == ANCHOR:
            self._report.anchor = f"{report.origin}: {len(self._said.anchored)} logs are named"
            self._witnesses(check)
        if report.origin in self._tails:
            report.findings.append(f"the log {report.origin} is there twice")
        self._tails[report.origin or report.path] = check.tail

    def _witnesses(self, check: "_LogCheck") -> None:
        """Compare the anchor with what witnesses have seen of it."""
        note = (check.files.read("witnessed") or b"").decode(errors="replace")
        policy = self._trust.policy
        if policy is None:
            return
        cosigners: dict[str, int] = {}
        if note:
            for name, witness in policy.witnesses.items():
                try:
                    cosigners[name] = witness.verifier.time_of(note)
                except BadSignature:
                    continue
            check.compare_claim(note, "a witness saw")
        self._report.witnesses = tuple(sorted(cosigners))
        if not policy.is_met_by(cosigners):
            self._report.gaps.append("no quorum of witnesses has seen the anchor")
        elif max(cosigners.values(), default=0) < self._trust.not_before:
            self._report.gaps.append("it is too long since a witness has seen the anchor")

    def conclude(self) -> Report:
        """Compare the logs with each other."""
        report, said = self._report, self._said
        by_origin = {log.origin: log for log in report.logs if log.origin}
        for origin, notes in said.anchored.items():
            if origin not in by_origin:
                report.findings.append(f"log {origin} is missing: it had {max(notes)} events")
                report.evidence.append(notes[max(notes)])
        for origin, note in self._trust.trusted.items():
            if origin not in by_origin:
                report.findings.append(f"log {origin} is missing: you hold a checkpoint of it")
                report.evidence.append(note)
        for log in report.logs:
            self._conclude_log(log)
        # What was lost, erased or not read again may hold the beginning or the end of a call.
        if not any(log.begin or log.pruned or log.erased or log.lost for log in report.logs):
            for call, where in said.unbegun.items():
                if call not in said.open_calls:
                    by_origin[where].findings.append(f"call {call} ended unbegun")
            for call, where in said.open_calls.items():
                is_over = by_origin[where].is_sealed
                if is_over and call not in said.unbegun and call not in said.closed:
                    by_origin[where].gaps.append(f"call {call} has no end")
        return report

    def _conclude_log(self, log: LogReport) -> None:
        tail = self._tails[log.origin or log.path]
        durable = self._said.durable.get(log.origin, 0)
        if log.events < durable and not log.findings:
            log.findings.append(f"{durable} events were on the disk, {log.events} are there")
        found = self._said.recovered.get(log.origin)
        if found is None:
            log.gaps += tail.gaps
        else:
            root = base64.b64encode(tail.root).decode()
            torn = tail.torn if log.pruned < log.events else found.torn
            if (found.size, found.root, found.torn) != (log.events, root, torn):
                log.findings.append(
                    f"{found.size} events were found when its writer had died, with another end"
                )
            return
        is_over = log.is_sealed or 0 < log.pruned == log.events
        if (
            not is_over
            and log.path != ANCHOR
            and log.origin
            and log.signed_at < self._trust.not_before
        ):
            log.gaps.append("it is too long since the log was last signed")


class _LogCheck:
    """One log against itself, and against what is said of it."""

    def __init__(self, files: LogFiles, report: LogReport, trust: Trust, said: _Said) -> None:
        self.files = files
        self.tail = _Tail()
        self._report = report
        self._trust = trust
        self._said = said
        self._sealed_checkpoints: int | None = None

    def run(self, *, is_anchor: bool) -> None:
        report = self._report
        notes = self.files.read("checkpoints.jsonl")
        if is_anchor:
            keys: Verifier | Delegated | None = self._trust.deployment
        else:
            keys = self._delegated(has_notes=bool(notes or self.files.read("checkpoint")))
        if keys is None:
            return
        verifier = keys if isinstance(keys, Verifier) else keys.log
        report.origin = verifier.name
        if notes is None:
            self.tail.gaps.append("checkpoints.jsonl is missing")
        last = self._read_checkpoints(notes or b"", verifier)
        if not report.findings:
            self._check_latest(last, None if isinstance(keys, Verifier) else keys)
        if not report.findings:
            self._read_lines(notes or b"", last)

    def _delegated(self, *, has_notes: bool) -> Delegated | None:
        note = self.files.read("delegation")
        if note is None:
            # A crash while the folder was made leaves this; nothing can have been signed then.
            where = self._report.findings if has_notes else self._report.gaps
            where.append("nobody vouches for the log's keys: delegation is missing")
            return None
        try:
            return Delegated.from_note(note.decode(), self._trust.deployment)
        except (BadSignature, MalformedPolicy, UnicodeDecodeError) as error:
            self._report.findings.append(f"the trusted key does not vouch for this log: {error}")
            return None

    # --- checkpoints ---

    def _read_checkpoints(self, notes: bytes, verifier: Verifier) -> tuple[Checkpoint, str] | None:
        """Verify every checkpoint; return the last one and its note."""
        report = self._report
        lines = notes.split(b"\n")
        if lines.pop():
            self.tail.gaps.append("the last checkpoint was not written to its end")
        last: tuple[Checkpoint, str] | None = None
        size = -1
        claims = dict(self._said.anchored.get(report.origin, {}))
        for number, line in enumerate(lines, 1):
            try:
                note = _note_of(line)
                checkpoint = Checkpoint.from_note(note, verifier)
                if len(Note.from_text(note).lines) != 1:
                    raise BadSignature("not signed by this key alone")
            except (BadSignature, MalformedCheckpoint, ValueError) as error:
                report.findings.append(f"checkpoint {number}: {error}")
                return None
            if checkpoint.size <= size:
                report.findings.append(f"checkpoint {number}: size {checkpoint.size} does not grow")
                return None
            if checkpoint.origin != report.origin:
                report.findings.append(f"checkpoint {number} is of another log")
                return None
            size = checkpoint.size
            claim = claims.pop(size, None)
            if claim is not None and Checkpoint.claimed_by(claim) != checkpoint:
                self._contradicted("the anchor names", claim, note)
                return None
            report.checkpoints += 1
            last = checkpoint, note
        if claims:
            self._contradicted("the anchor names", claims[max(claims)], last[1] if last else "")
        return last

    def _contradicted(self, who: str, theirs: str, ours: str) -> None:
        claim = Checkpoint.claimed_by(theirs)
        self._report.findings.append(f"{who} a checkpoint of {claim.size} events that is not here")
        self._report.evidence += [note for note in (theirs, ours) if note]

    def compare_claim(self, note: str, who: str) -> None:
        """Find a checkpoint that somebody else holds in the tree that is here."""
        try:
            claim = Checkpoint.claimed_by(note)
            is_ours = (
                claim.size <= self._report.events
                and claim.origin == self._report.origin
                and Frontier.at(claim.size, self.files.node).root() == claim.root
            )
        except (BadSignature, MalformedCheckpoint, Damaged, IndexError):
            self._report.findings.append(f"what {who} cannot be compared with this log")
            return
        if not is_ours:
            notes = self.files.notes()
            self._contradicted(who, note, notes[-1] if notes else "")

    def _check_latest(self, last: tuple[Checkpoint, str] | None, keys: Delegated | None) -> None:
        """Compare `checkpoint` with the list, which is written first and never shortened."""
        report = self._report
        latest = self.files.read("checkpoint")
        if latest is None:
            if last is not None:
                self.tail.gaps.append("checkpoint is missing")
            return
        try:
            note = latest.decode()
            parts = Note.from_text(note)
            if keys is not None:
                report.signed_at = keys.clock.time_of(note)
            if len(parts.lines) != (1 if keys is None else 2):
                raise BadSignature("signed by others than the log and its clock")
        except (BadSignature, UnicodeDecodeError) as error:
            report.findings.append(f"checkpoint: {error}")
            return
        signed = f"{parts.text}\n{parts.lines[0]}\n"
        if last is not None and signed == last[1]:
            return
        if signed in self.files.notes():
            self.tail.gaps.append(
                "`checkpoint` is behind the list: the writer was stopped between the two"
            )
        else:
            report.findings.append("`checkpoint` is not in the list of checkpoints")
            report.evidence += [note, *([last[1]] if last else [])]

    # --- lines ---

    def _read_lines(self, notes: bytes, last: tuple[Checkpoint, str] | None) -> None:
        report = self._report
        trusted = self._trust.trusted.get(report.origin)
        pruned = self._said.pruned.get(report.origin)
        tree = Frontier()
        segments = self._segments()
        if report.findings:
            return
        try:
            if trusted is not None:
                claim = Checkpoint.claimed_by(trusted)
                if claim.size > (last[0].size if last else 0):
                    self._contradicted("you hold", trusted, last[1] if last else "")
                    return
                tree = Frontier.at(claim.size, self.files.node)
                report.begin = claim.size
                if tree.root() != claim.root:
                    self._contradicted("you hold", trusted, last[1] if last else "")
                    return
            elif pruned is not None and not (segments and segments[0][0] == 0):
                roots = [base64.b64decode(each) for each in pruned.frontier]
                tree = Frontier(pruned.size, roots)
                report.pruned = pruned.size
        except (Damaged, IndexError, ValueError) as error:
            report.findings.append(f"the beginning of the log cannot be had: {error}")
            return
        if segments and segments[0][0] > tree.size:
            report.findings.append(
                f"UNAUTHORISED REMOVAL: the first {segments[0][0]} events are gone"
            )
            return
        checkpoints = (Checkpoint.claimed_by(_note_of(line)) for line in notes.split(b"\n")[:-1])
        self._verify_lines(self._lines(segments, tree.size), checkpoints, tree)

    def _segments(self) -> list[tuple[int, Path]]:
        folder = self.files.directory / "seg"
        if not folder.is_dir():
            self._report.gaps.append("seg is missing")
            return []
        segments = self.files.segments()
        if len(segments) != len(list(folder.iterdir())):
            self._report.findings.append("seg holds a file that is not a segment")
        return segments

    def _lines(self, segments: Sequence[tuple[int, Path]], begin: int) -> Iterator[bytes]:
        """Return the log's lines from `begin` on without their line feeds, segment by segment."""
        report = self._report
        index = 0
        for position, (first, segment) in enumerate(segments):
            is_last = position + 1 == len(segments)
            if position == 0:
                index = first
            elif first != index:
                report.findings.append(f"segment {segment.name} does not begin at event {index}")
                return
            if not is_last and segments[position + 1][0] <= begin:
                index = segments[position + 1][0]
                continue
            with segment.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        if not is_last:
                            report.findings.append(f"segment {segment.name} is cut short")
                        else:
                            self.tail.torn = len(line)
                            self.tail.gaps.append("the last event was not written to its end")
                        return
                    index += 1
                    if index > begin:
                        yield line[:-1]

    def _verify_lines(
        self, lines: Iterable[bytes], checkpoints: Iterator[Checkpoint], tree: Frontier
    ) -> None:
        """Check the lines against the checkpoints and themselves."""
        report = self._report
        decode = msgspec.json.Decoder(_Line).decode
        begin = tree.size
        signed = 0
        expected = next(checkpoints, None)
        while expected is not None and expected.size <= begin:
            signed, expected = expected.size, next(checkpoints, None)
        due = expected.size if expected is not None else -1
        tally = _Tally(report, self._said)
        origin = report.origin
        for data in lines:
            index = tree.size
            if data.startswith(REDACTED):
                if not self._take_redacted(data, tree):
                    return
            else:
                tree.append(data)
                try:
                    line = decode(data)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    report.findings.append(f"event {index} is not an event")
                    return
                if line.seq != index or line.origin != origin or report.is_sealed:
                    report.findings.append(_misplaced(index, line))
                    return
                if not tally.take(line):
                    return
            if index + 1 == due and expected is not None:
                if tree.root() != expected.root:
                    report.findings.append(f"the first {due} events are not those that were signed")
                    return
                signed, expected = due, next(checkpoints, None)
                due = expected.size if expected is not None else -1
        report.events = tree.size
        self.tail.root = tree.root()
        if report.findings:
            return
        if expected is not None:
            report.findings.append(f"{expected.size} events were signed, {tree.size} are there")
            return
        tally.conclude()
        self._check_end(tree.size, signed, tally.sealed_checkpoints)

    def _take_redacted(self, data: bytes, tree: Frontier) -> bool:
        report = self._report
        try:
            leaf = redacted_hash(data)
        except Damaged as error:
            report.findings.append(f"event {tree.size}: {error}")
            return False
        if tree.size not in self._said.redacted.get(report.origin, ()):
            report.findings.append(f"UNAUTHORISED REMOVAL: event {tree.size} was erased")
            return False
        tree.append_hash(leaf)
        report.erased += 1
        return True

    def _check_end(self, size: int, signed: int, sealed: int | None) -> None:
        """Note what is missing at the end of a log of `size` events."""
        report = self._report
        if sealed is not None:
            # A crash just before the last checkpoint leaves the seal itself unsigned.
            written = sealed + (size == signed)
            if written != report.checkpoints:
                report.findings.append(
                    f"{written} checkpoints were written, {report.checkpoints} are there"
                )
        if size > signed:
            self.tail.gaps.append(f"the last {size - signed} events are not signed")


class _Tally:
    """What the events of one log add up to."""

    def __init__(self, report: LogReport, said: _Said) -> None:
        self._report = report
        self._said = said
        self._open: set[str] = set()
        self.sealed_checkpoints: int | None = None

    def take(self, line: _Line) -> bool:
        """Count one event; return whether it may stand where it does."""
        report, said, kind = self._report, self._said, line.type
        if kind == "call.start":
            report.started += 1
            if line.call in self._open:
                report.findings.append(f"event {line.seq}: call {line.call} started twice")
                return False
            self._open.add(line.call)
        elif kind == "call.end":
            report.ended += 1
            if line.call in self._open:
                self._open.discard(line.call)
            elif line.call in said.unbegun or line.call in said.closed:
                report.findings.append(f"event {line.seq}: call {line.call} ended twice")
                return False
            else:
                said.unbegun[line.call] = report.origin
        elif kind == "call.denied":
            report.denied += 1
        elif kind == "refusals.counted":
            report.counted += line.total
        elif kind == "call.unclosed":
            report.unclosed += 1
            said.closed.add(line.call)
        elif kind.startswith("log."):
            self._take_log(line)
        return True

    def _take_log(self, line: _Line) -> None:
        said = self._said
        match line.type:
            case "log.sealed":
                self._report.is_sealed = True
                self.sealed_checkpoints = line.checkpoints
            case "log.gap":
                self._report.lost += line.lost
                said.durable[line.log] = max(line.durable, said.durable.get(line.log, 0))
            case "log.recovered":
                said.recovered[line.log] = line
            case "log.anchored":
                said.anchored.setdefault(line.log, {})[line.size] = line.note
            case "log.redacted":
                said.redacted.setdefault(line.log, set()).update(line.events)
            case "log.pruned":
                said.pruned[line.log] = line
            case _:
                pass

    def conclude(self) -> None:
        """Leave to the other logs what this one does not say the end of."""
        self._report.open = len(self._open)
        self._said.open_calls |= dict.fromkeys(self._open, self._report.origin)


def _misplaced(index: int, line: _Line) -> str:
    if line.seq == index:
        return f"event {index} is of {line.origin}, or comes after the log was sealed"
    return f"event {index} says it is {line.seq} of {line.origin}"


def _note_of(line: bytes) -> str:
    note = json.loads(line)
    if not isinstance(note, str) or json.dumps(note, ensure_ascii=False).encode() != line:
        raise ValueError("not the one spelling of a note")
    return note
