"""A kill hits what it names, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.kills import Kill, KillTable, Scope
from policies.request import Principal

ALICE = Principal(issuer="https://idp", subject="alice", tenant="acme")


def kill(scope: Scope, value: str = "", issuer: str = "", kill_id: str = "k") -> Kill:
    """Return a kill."""
    return Kill(
        kill_id=kill_id,
        scope=scope,
        value=value,
        issuer=issuer,
        reason="r",
        placed_by="o",
        placed_at=1,
    )


@pytest.mark.parametrize(
    ("placed", "hits_session", "hits_call"),
    [
        (kill(Scope.ALL), True, True),
        (kill(Scope.TENANT, "acme"), True, True),
        (kill(Scope.TENANT, "acme", "https://idp"), True, True),
        (kill(Scope.TENANT, "acme", "https://other"), False, False),
        (kill(Scope.TENANT, "alice"), False, False),
        (kill(Scope.SUBJECT, "alice"), True, True),
        (kill(Scope.SUBJECT, "alice", "https://other"), False, False),
        (kill(Scope.SUBJECT, "acme"), False, False),
        (kill(Scope.SESSION, "sid"), True, True),
        (kill(Scope.SESSION, "other"), False, False),
        (kill(Scope.FINGERPRINT, "v1:2"), True, False),
        (kill(Scope.FINGERPRINT, "v1:1"), True, True),
        (kill(Scope.FINGERPRINT, "v1:3"), False, False),
        (kill(Scope.PROVIDER, "openai"), False, True),
        (kill(Scope.PROVIDER, "gemini"), False, False),
    ],
    ids=str,
)
def test_hits_what_it_names(placed: Kill, *, hits_session: bool, hits_call: bool) -> None:
    """A session of two keys, and a call with the first of them to openai."""
    table = KillTable([placed])
    found = table.find_session(ALICE, "sid", ["v1:1", "v1:2"])
    assert found == (placed if hits_session else None)
    assert table.find(ALICE, "sid", "v1:1", "openai") == (placed if hits_call else None)


def test_a_deposit_for_a_stopped_provider_is_seen() -> None:
    """Of several providers one that is stopped is enough."""
    table = KillTable([kill(Scope.PROVIDER, "openai")])
    assert table.find_provider(["gemini", "openai"]) is not None
    assert table.find_provider(["gemini"]) is None


scopes = st.sampled_from([scope for scope in Scope if scope is not Scope.ALL])


@given(st.lists(st.tuples(scopes, st.sampled_from("abc"), st.sampled_from(["", "i", "j"]))))
def test_a_table_of_many_is_each_of_them(kills: list[tuple[Scope, str, str]]) -> None:
    """Whether something is hit by many kills is whether any one of them hits it."""
    placed = [kill(*each, kill_id=str(n)) for n, each in enumerate(kills)]
    principal = Principal(issuer="i", subject="a", tenant="b")
    table = KillTable(placed)
    alone = [KillTable([each]) for each in placed]
    asked = (principal, "c", "a", "b")
    assert bool(table.find(*asked)) == any(each.find(*asked) for each in alone)
    assert table.standing() == tuple(placed)


def test_replacing_forgets_what_was_lifted() -> None:
    """Only the last that were given stand."""
    table = KillTable([kill(Scope.ALL)])
    table.replace([])
    assert (len(table), table.find(ALICE, "sid", "v1:1", "openai"), table.get("k")) == (
        0,
        None,
        None,
    )
