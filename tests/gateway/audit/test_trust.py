"""Policies say what tlog-policy lets them say, and a delegation vouches for one log's keys."""

import pytest

from gateway.audit.trust import DELEGATION, Delegated, LogKeys, MalformedPolicy, Policy
from keys.signing import BadSignature, Cosigner, Signer, Verifier

LOG = Signer("example.com/log", bytes(32)).vkey
W1, W2, W3 = (Cosigner(f"w{n}.example", bytes([n]) * 32).vkey for n in (1, 2, 3))
WITNESSES = f"witness a {W1} https://a.example/\nwitness b {W2}\nwitness c {W3}\n"
DEPLOYMENT = Signer("demo", bytes(range(32)))


@pytest.mark.parametrize(
    ("rest", "met", "unmet"),
    [
        ("quorum none", [(), ("a",)], []),
        ("quorum b", [("b",), ("a", "b")], [(), ("a", "c")]),
        ("group g 2 a b c\nquorum g", [("a", "c")], [("b",), ("x", "y")]),
        ("group g any a b\nquorum g", [("a",), ("b",)], [("c",)]),
        ("group g all a b\nquorum g", [("a", "b")], [("a",), ("b", "c")]),
        ("group g any a b\ngroup h all g c\nquorum h", [("b", "c")], [("a", "b"), ("c",)]),
    ],
)
def test_quorums(rest: str, met: list[tuple[str, ...]], unmet: list[tuple[str, ...]]) -> None:
    """A quorum is met by its witnesses, or by enough members of its group, and by nobody else."""
    policy = Policy.from_text(f"# ours\nlog {LOG} https://log.example/\n\n{WITNESSES}{rest}\n")
    assert policy.logs[0].url == "https://log.example/"
    assert policy.witnesses["a"].url == "https://a.example/"
    assert all(policy.is_met_by(each) for each in met)
    assert not any(policy.is_met_by(each) for each in unmet)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (WITNESSES, 4),
        (WITNESSES + "quorum d", 4),
        (WITNESSES + "quorum a\nquorum b", 5),
        (WITNESSES + "group g 4 a b c\nquorum g", 4),
        (WITNESSES + "group g 0 a\nquorum g", 4),
        (WITNESSES + "group g \u0661 a\nquorum g", 4),
        (WITNESSES + "group g any a a\nquorum g", 4),
        (WITNESSES + "group g any h\ngroup h any a\nquorum g", 4),
        (WITNESSES + "group a any b\nquorum a", 4),
        (WITNESSES + f"witness none {W1}\nquorum none", 4),
        (f"log {W1}\nquorum none", 1),
        (f"witness a {LOG}\nquorum none", 1),
        ("quorum none extra", 1),
        ("\n" * 1000 + "quorum none", 1000),
    ],
)
def test_malformed_policies(text: str, line: int) -> None:
    """What names nobody, somebody twice, or a quorum that cannot be, is refused with its line."""
    with pytest.raises(MalformedPolicy, match=f"^{line}: "):
        Policy.from_text(text)


def test_a_delegation_gives_the_keys_it_was_made_for() -> None:
    """The deployment key's word opens under it alone, to the keys of exactly that log."""
    keys = LogKeys.draw("demo/log", DEPLOYMENT)
    found = Delegated.from_note(keys.delegation, Verifier.from_vkey(DEPLOYMENT.vkey))
    assert (found.log.vkey, found.clock.vkey) == (keys.log.vkey, keys.clock.vkey)
    with pytest.raises(BadSignature):
        Delegated.from_note(keys.delegation, Verifier.from_vkey(Signer("demo", bytes(32)).vkey))


def test_other_texts_of_the_deployment_key_delegate_nothing() -> None:
    """What was signed for another purpose, or for more than one log, is not a delegation."""
    verifier = Verifier.from_vkey(DEPLOYMENT.vkey)
    clock = f"witness clock {W1}\nquorum clock\n"
    for text in (
        f"log {LOG}\n{clock}",
        f"{DELEGATION}\nlog {LOG}\nquorum none\n",
        f"{DELEGATION}\nlog {LOG}\nlog {LOG}\n{clock}",
        f"{DELEGATION}2\nlog {LOG}\n{clock}",
    ):
        with pytest.raises(MalformedPolicy):
            Delegated.from_note(DEPLOYMENT.sign_note(text), verifier)
