"""One rule, compiled. No I/O."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from policies.conditions import Condition
from policies.obligations import Change


class Effect(StrEnum):
    """What a matching rule does."""

    ALLOW = "allow"
    DENY = "deny"
    REQUIRE = "require"
    TRANSFORM = "transform"


PHI: Final = "phi"
"""The label of protected health information, and the name of the rule that is built in for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rule is written."""

    path: str = ""
    line: int = 1
    column: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One compiled rule. `that` is empty but for `require`, `change` is there for `transform`.

    `authorises_phi`: it is an allow that names PHI, its purposes and its tenants.
    """

    id: str
    effect: Effect
    match: tuple[Condition, ...]
    that: tuple[Condition, ...] = ()
    change: Change | None = None
    message: str = ""
    is_shadow: bool = False
    authorises_phi: bool = False
    place: Place = Place()


def is_phi(label: str) -> bool:
    """Return whether a label, or the pattern of one, speaks of PHI: `phi`, or `phi.mrn`."""
    return label == PHI or label.startswith(f"{PHI}.")
