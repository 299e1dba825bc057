"""Whom to believe: the trust file of C2SP tlog-policy, and the note by which a log's keys are delegated.

A policy names logs, witnesses, groups of witnesses and one quorum (https://c2sp.org/tlog-policy).
Every log has keys of its own, drawn when it is opened and kept in memory only. The deployment key
vouches for them once, in a note whose text is a policy of that one log: `log` is the key that signs its
checkpoints, the witness `clock` the key that says when. Whoever steals a running process gets the
keys of its one log, not of those before it. No I/O.
"""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Self

from keys.signing import CosignatureVerifier, Cosigner, Signer, Verifier

DELEGATION: Final = "# veklom.log.v1"
"""First line of a delegation: what is signed for one purpose is not taken for another."""

MAX_LINES: Final = 1000
"""Of a policy; the largest public one has some fifty."""


class MalformedPolicy(ValueError):
    """A text that is not a policy; the message begins with the line's number."""


@dataclass(frozen=True, slots=True)
class LogKey:
    """A log that a policy trusts: its key's name is its origin."""

    verifier: Verifier
    url: str = ""


@dataclass(frozen=True, slots=True)
class WitnessKey:
    """A witness that a policy names."""

    verifier: CosignatureVerifier
    url: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """So many of these witnesses and groups must have cosigned."""

    threshold: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """Logs, witnesses, and how many of whom must have seen a checkpoint."""

    logs: tuple[LogKey, ...]
    witnesses: Mapping[str, WitnessKey]
    groups: Mapping[str, Group]
    quorum: str

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the policy that a text states.

        Raises:
            MalformedPolicy: It states none.
        """
        draft = _Draft()
        lines = text.split("\n")
        if len(lines) > MAX_LINES:
            raise MalformedPolicy(f"{MAX_LINES}: too many lines")
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                draft.take(words)
            except ValueError as error:
                raise MalformedPolicy(f"{number}: {error}") from None
        if draft.quorum is None:
            raise MalformedPolicy(f"{len(lines)}: no quorum is stated")
        return cls(tuple(draft.logs), draft.witnesses, draft.groups, draft.quorum)

    def is_met_by(self, cosigners: Collection[str]) -> bool:
        """Return whether these witnesses, by the policy's names, are a quorum."""
        return self.quorum == "none" or self._has(self.quorum, cosigners)

    def _has(self, name: str, cosigners: Collection[str]) -> bool:
        group = self.groups.get(name)
        if group is None:
            return name in cosigners
        return sum(self._has(member, cosigners) for member in group.members) >= group.threshold


class _Draft:
    """A policy while it is read, line by line: a name must stand before it is used."""

    def __init__(self) -> None:
        self.logs: list[LogKey] = []
        self.witnesses: dict[str, WitnessKey] = {}
        self.groups: dict[str, Group] = {}
        self.quorum: str | None = None

    def take(self, words: list[str]) -> None:
        match words:
            case ["log", vkey, *url] if len(url) < 2:
                self.logs.append(LogKey(Verifier.from_vkey(vkey), *url))
            case ["witness", name, vkey, *url] if len(url) < 2:
                self._name(name)
                self.witnesses[name] = WitnessKey(CosignatureVerifier.from_vkey(vkey), *url)
            case ["group", name, threshold, *members] if members:
                self._name(name)
                self.groups[name] = self._group(threshold, members)
            case ["quorum", name] if self.quorum is None:
                if name != "none" and not self._knows(name):
                    raise ValueError(f"{name} is neither a witness nor a group")
                self.quorum = name
            case _:
                raise ValueError(f"not a line of a policy: {words[0]}")

    def _knows(self, name: str) -> bool:
        return name in self.witnesses or name in self.groups

    def _name(self, name: str) -> None:
        if name == "none" or self._knows(name):
            raise ValueError(f"{name} cannot be named so, or is named twice")

    def _group(self, threshold: str, members: list[str]) -> Group:
        for member in members:
            if not self._knows(member):
                raise ValueError(f"{member} is neither a witness nor a group")
        if len(set(members)) < len(members):
            raise ValueError("a member is named twice")
        count = {"all": len(members), "any": 1}.get(threshold)
        if count is None:
            if not threshold.isascii() or not threshold.isdigit():
                raise ValueError("a group needs all, any or a number")
            count = int(threshold)
        if not 1 <= count <= len(members):
            raise ValueError("a group needs between one and all of its members")
        return Group(count, tuple(members))


@dataclass(frozen=True, slots=True)
class LogKeys:
    """The private keys of one log, and the deployment key's word for them."""

    log: Signer
    clock: Cosigner
    delegation: str

    @classmethod
    def draw(cls, origin: str, deployment: Signer) -> Self:
        """Return fresh keys for the log of this origin."""
        log = Signer(origin, secrets.token_bytes(32))
        clock = Cosigner(f"{origin}/clock", secrets.token_bytes(32))
        text = f"{DELEGATION}\nlog {log.vkey}\nwitness clock {clock.vkey}\nquorum clock\n"
        return cls(log, clock, deployment.sign_note(text))


@dataclass(frozen=True, slots=True)
class Delegated:
    """The public keys of one log."""

    log: Verifier
    clock: CosignatureVerifier

    @classmethod
    def from_note(cls, note: str, deployment: Verifier) -> Self:
        """Return the keys for which the deployment key vouches.

        Raises:
            BadSignature: It does not.
            MalformedPolicy: It vouches for something else.
        """
        text = deployment.open_note(note)
        if not text.startswith(DELEGATION + "\n"):
            raise MalformedPolicy("1: not the delegation of a log's keys")
        policy = Policy.from_text(text)
        if len(policy.logs) != 1 or list(policy.witnesses) != ["clock"]:
            raise MalformedPolicy("1: not the keys of one log")
        return cls(policy.logs[0].verifier, policy.witnesses["clock"].verifier)
