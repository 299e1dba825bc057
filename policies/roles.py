"""What operators may do: roles, the permissions in them, and when they must prove themselves again.

Nobody is an operator by default: the configuration grants a role of the gateway to whoever an issuer
gives one of its own. Whatever changes something needs a fresh proof with a second factor (step-up,
RFC 9470). No I/O.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

from policies.request import Principal


class Permission(StrEnum):
    """What a route of the admin API needs."""

    KILLS_READ = "kills:read"
    KILLS_WRITE = "kills:write"


ROLES: Final[dict[str, frozenset[Permission]]] = {
    "viewer": frozenset({Permission.KILLS_READ}),
    "operator": frozenset({Permission.KILLS_READ, Permission.KILLS_WRITE}),
}

CHANGING: Final = frozenset({Permission.KILLS_WRITE})
"""Permissions that are used only after a step-up."""

SECOND_FACTORS: Final = ("mfa", "otp", "hwk", "swk", "sc", "fpt", "pop")
"""Authentication methods (RFC 8176) that are, or imply, more than a password."""


CLOCKS_DIFFER_SECONDS: Final = 60
"""How far ahead an issuer's clock may be; a proof from later than that would never age."""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever `issuer` gives the role `role` is a `grants` here."""

    issuer: str
    role: str
    grants: str


class StepUp(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as a fresh proof: at most `max_age_seconds` ago, by one of `amr` or `acr`."""

    max_age_seconds: int
    amr: tuple[str, ...] = SECOND_FACTORS
    acr: tuple[str, ...] = ()

    def is_met(self, principal: Principal, now: float) -> bool:
        """Return whether the principal's last proof is one."""
        age = now - principal.authenticated_at
        by_factor = not principal.amr.isdisjoint(self.amr) or principal.acr in self.acr
        return by_factor and -CLOCKS_DIFFER_SECONDS <= age <= self.max_age_seconds

    def to_challenge(self) -> str:
        """Return the challenge that asks for one (RFC 9470 3)."""
        acr = f' acr_values="{" ".join(self.acr)}",' if self.acr else ""
        error = 'error="insufficient_user_authentication"'
        return f'Bearer realm="veklom", {error},{acr} max_age="{self.max_age_seconds}"'


def permissions_of(principal: Principal, grants: Iterable[Grant]) -> frozenset[Permission]:
    """Return everything that the principal may do."""
    held = [
        ROLES[grant.grants]
        for grant in grants
        if grant.issuer == principal.issuer and grant.role in principal.roles
    ]
    return frozenset().union(*held)
