"""The judge's answer. A denial is a value with a reason, never an exception. No I/O."""

from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """`ERROR` denies as `DENY` does; it is kept apart so that a broken rule is not taken for a no."""

    ALLOW = "allow"
    DENY = "deny"
    ERROR = "error"


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, by which rules of which policy set, and why.

    `rules` are the ids of the rules that settled it (empty for the default deny); `message` is for
    the caller, `reasons` for the operator.
    """

    verdict: Verdict
    rules: tuple[str, ...] = ()
    message: str = ""
    reasons: tuple[str, ...] = ()
    policy_digest: str = ""

    @property
    def is_allowed(self) -> bool:
        """Whether the call may go on."""
        return self.verdict is Verdict.ALLOW
