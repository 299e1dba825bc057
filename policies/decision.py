"""The judge's answer. A denial is a value with a reason, never an exception. No I/O."""

from enum import StrEnum

import msgspec

from policies.obligations import Obligations
from policies.request import AccessRequest


class Verdict(StrEnum):
    """`ERROR` denies as `DENY` does; it is kept apart so that a broken rule is not taken for a no."""

    ALLOW = "allow"
    DENY = "deny"
    ERROR = "error"


class Would(msgspec.Struct, frozen=True, kw_only=True):
    """What would have been decided with the rules in shadow enforced, where that is something else."""

    verdict: Verdict
    rules: tuple[str, ...]
    reasons: tuple[str, ...]
    changes: tuple[str, ...]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, by which rules of which policy set, and why.

    `rules` are the ids of the rules that settled it (empty for the default deny); `message` is for
    the caller, `reasons` for the operator. `judged` is the call as the obligations leave it.
    """

    verdict: Verdict
    judged: AccessRequest
    rules: tuple[str, ...] = ()
    message: str = ""
    reasons: tuple[str, ...] = ()
    policy_digest: str = ""
    obligations: Obligations | None = None
    would: Would | None = None

    @property
    def is_allowed(self) -> bool:
        """Whether the call may go on."""
        return self.verdict is Verdict.ALLOW

    @property
    def changes(self) -> tuple[str, ...]:
        """Return in words what the call has to be changed in."""
        return self.obligations.changes if self.obligations is not None else ()
