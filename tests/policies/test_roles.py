"""Operators may do what they were granted, and change things only after a fresh proof."""

import pytest

from policies.request import Principal
from policies.roles import CHANGING, ROLES, Grant, Permission, StepUp, permissions_of

GRANTS = (
    Grant(issuer="i", role="ops", grants="operator"),
    Grant(issuer="i", role="see", grants="viewer"),
)


def principal(issuer: str, *roles: str) -> Principal:
    """Return somebody with these roles."""
    return Principal(issuer=issuer, subject="s", tenant="t", roles=frozenset(roles))


@pytest.mark.parametrize(
    ("who", "may"),
    [
        (principal("i"), frozenset()),
        (principal("i", "operator"), frozenset()),
        (principal("i", "see"), ROLES["viewer"]),
        (principal("i", "ops"), ROLES["operator"]),
        (principal("i", "ops", "see"), ROLES["operator"]),
        (principal("j", "ops"), frozenset()),
    ],
)
def test_what_is_granted(who: Principal, may: frozenset[Permission]) -> None:
    """A role counts as the issuer's own word only, and the gateway's names mean nothing in a token."""
    assert permissions_of(who, GRANTS) == may


def test_whoever_only_looks_changes_nothing() -> None:
    """No permission that changes something is a viewer's."""
    assert not ROLES["viewer"] & CHANGING
    assert {permission for permission in Permission if permission.endswith(":write")} == CHANGING


@pytest.mark.parametrize(
    ("amr", "acr", "at", "is_met"),
    [
        ((), "", 1000, False),
        (("pwd",), "", 1000, False),
        (("pwd", "otp"), "", 1000, True),
        (("otp",), "", 940, True),
        (("otp",), "", 939, False),
        (("otp",), "", 0, False),
        (("otp",), "", 1060, True),
        (("otp",), "", 1061, False),
        ((), "urn:mfa", 1000, True),
        ((), "urn:pwd", 1000, False),
    ],
)
def test_a_fresh_proof(amr: tuple[str, ...], acr: str, at: int, *, is_met: bool) -> None:
    """A second factor, by method or level, and not long ago; 0 is an instant that nobody vouched for."""
    step_up = StepUp(max_age_seconds=60, acr=("urn:mfa",))
    who = Principal(
        issuer="i", subject="s", tenant="t", amr=frozenset(amr), acr=acr, authenticated_at=at
    )
    assert step_up.is_met(who, 1000.0) is is_met


def test_without_levels_an_empty_one_is_none() -> None:
    """A token that names no level does not meet a step-up that asks for none."""
    who = Principal(issuer="i", subject="s", tenant="t", authenticated_at=1000)
    assert not StepUp(max_age_seconds=60).is_met(who, 1000.0)


def test_the_challenge_says_what_is_wanted() -> None:
    """As RFC 9470 has it, with levels where some are configured."""
    asked = StepUp(max_age_seconds=900, acr=("urn:mfa", "high")).to_challenge()
    assert 'error="insufficient_user_authentication"' in asked
    assert 'acr_values="urn:mfa high"' in asked
    assert asked.endswith('max_age="900"')
    assert "acr_values" not in StepUp(max_age_seconds=900).to_challenge()
